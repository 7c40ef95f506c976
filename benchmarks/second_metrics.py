"""What the metrics beside Frechet distance and RMSE say of samples that are known, for docs/guides/evaluation.md.

    python benchmarks/second_metrics.py             # both files; five minutes on one core
    python benchmarks/second_metrics.py outside     # one of them

Writes benchmarks/results/outside.json (the checkerboard: data, kernel density estimates of it, the exact teacher, a
student of ITVM) and memorisation.json (Fashion-MNIST: copies, blur, held-out rows, samples of the teacher that comes
along, by three statistics of the nearest training row).
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from record import FOLDER, here, write
from torch import Tensor
from torch.nn import functional

import fewstep
from fewstep.evaluation.copies import two_nearest
from fewstep.evaluation.extractor import extract, trained_classifier
from fewstep.evaluation.points import histogram_kl, outside, quantiles
from fewstep.generation.drawing import draw
from fewstep.networks import MLP

COUNT = 10_000  # points of a set


def checkerboard() -> None:
    field, seeded = fewstep.CheckerboardField(), torch.Generator().manual_seed(0)
    data, fresh = field.data(COUNT, seeded), field.data(COUNT, seeded)
    rows: list[list[Any]] = [["data", None, histogram_kl(fresh, data), outside(fresh, field.inside)]]
    scott, likely = COUNT ** (-1 / 6), likeliest(data[:5000])
    for rule, width in (("Scott's rule", scott), ("likelihood of rows left out", likely)):
        moved = fresh + width * torch.randn(COUNT, 2, generator=seeded)
        name = f"kernel density estimate, bandwidth {width:.3f} ({rule})"
        rows.append([name, None, histogram_kl(moved, data), outside(moved, field.inside)])
    torch.manual_seed(0)
    student = fewstep.FlowMap.from_field(field, MLP(2, width=128, depth=4, times=2))
    made = fewstep.fit(
        student, fewstep.ITVM(field, ema=0.97, ends=0.02), fewstep.load_data("checkerboard"), steps=2000, batch=512,
        lr=3e-3, warmup=50, ema=0.998, quiet=True,
    )  # fmt: skip
    found = fewstep.evaluate(made.ema, teacher=field, steps=(1, 2, 4, 8), teacher_steps=(1, 2, 4, 8, 100), count=COUNT)
    names = {"student": "ITVM, an MLP of 4 x 128, 2,000 steps of 512 rows", "teacher": "exact teacher, Euler steps"}
    rows += [[names[row["model"]], row["nfe"], row["histogram_kl"], row["outside"]] for row in found.rows]
    write(
        FOLDER / "outside.json",
        title="The checkerboard: share of points outside its squares",
        columns=["points", "network calls", "histogram KL", "outside"],
        formats={"histogram KL": "{:.3f}", "outside": "{:.4f}"},
        rows=rows,
        **here(seeds=[0], notes=[f"{COUNT} points of each, the data of the KL {COUNT} others."]),
    )


def likeliest(x: Tensor) -> float:
    """The bandwidth of a Gaussian kernel density estimate of x (N, 2) under which rows left out are likeliest."""
    squares = torch.cdist(x, x).square().fill_diagonal_(torch.inf)
    widths = torch.logspace(-2, 0, 25)
    found = [float(torch.logsumexp(-squares / (2 * h * h), 1).mean() - 2 * h.log()) for h in widths]
    return float(widths[max(range(len(found)), key=found.__getitem__)])


def clothes() -> None:
    seeded = torch.Generator().manual_seed(0)
    own, other = fewstep.load_data("fashion-mnist"), fewstep.load_data("fashion-mnist", split="test")
    judge = trained_classifier(own)
    training = own.rows(torch.arange(60_000), seeded).data
    held_out, fresh = other.rows(torch.randperm(10_000, generator=seeded)[:3000], seeded).data.tensor_split([2000])
    columns = ["samples"]
    rows: list[list[Any]] = [[name] for name, _ in named(training, fresh)]
    for space, view in (("pixels", lambda x: x), ("features", lambda x: extract(judge, x))):
        seen = view(training)
        first, ratio = both(view(held_out), seen)
        near, alone = quantiles(first, (0.05,))[0], quantiles(ratio, (0.05,))[0]
        columns += [f"rank of d1, {space}", f"share by d1, {space}", f"share by d1 / d2, {space}"]
        for row, (_, samples) in zip(rows, named(training, fresh), strict=True):
            away, apart = both(view(samples), seen)
            rank = (away[:, None] < first[None]).double().mean()
            row += [float(rank), float((away <= near).double().mean()), float((apart <= alone).double().mean())]
    write(
        FOLDER / "memorisation.json",
        title="Fashion-MNIST: is a sample a copy? Three statistics of its nearest training row",
        columns=columns,
        formats=dict.fromkeys(columns[1:], "{:.3f}"),
        rows=rows,
        **here(
            seeds=[0],
            notes=[
                "1,000 samples, 60,000 training rows, 2,000 held-out rows; features of the small classifier.",
                "rank: share of pairs of a sample and a held-out row in which the sample is nearer (0.5 by chance).",
                "share: of samples at most at the 5 % quantile of the held-out rows (0.05 by chance).",
            ],
        ),
    )


def both(x: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """d1 and d1 / d2 of each row of x."""
    first, second = two_nearest(x, training).unbind(1)
    return first, first / second


_drawn: dict[int, Tensor] = {}


def named(training: Tensor, fresh: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Sets of 1000 images that are known to be copies, or not."""
    noise = torch.randn(1000, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    copies = training[:1000]
    yield "fresh rows", fresh
    yield "fresh rows, blurred (means of 3 x 3)", functional.avg_pool2d(fresh, 3, 1, 1)
    yield "copies", copies
    yield "copies with noise of 0.05", (copies + 0.05 * noise).clamp(-1, 1)
    yield "copies with noise of 0.2", (copies + 0.2 * noise).clamp(-1, 1)
    yield "5 % copies, 95 % fresh rows", torch.cat([copies[:50], fresh[50:]])
    teacher: Any = fewstep.load("fewstep:fashion-mnist")
    for steps in (2, 4, 16):
        if steps not in _drawn:
            _drawn[steps] = draw(teacher, 1000, steps, batch=500)[0]
        yield f"the teacher in {steps} steps", _drawn[steps]


if __name__ == "__main__":
    for part, measure in (("outside", checkerboard), ("memorisation", clothes)):
        if part in (sys.argv[1:] or [part]):
            measure()
