"""What ITVM's options are worth: each variant trained alike on one teacher, network and seed.

    python benchmarks/ablation.py checkerboard --steps 2000 --seeds 0 1
    python benchmarks/ablation.py mnist-vit --cpu-seconds 200          # wants $FEWSTEP_DATA, see examples/mnist_vit.py

One thread; for the same number of steps, or the same CPU time (wall time would favour whom the machine favours).
Writes a results file (--out): for points, the RMSE to the teacher's exact end points at 1, 2, 4, 8 steps; for images,
the Frechet distance in a small classifier's features. ``--only NAME`` runs some of the variants.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import here, write

from fewstep.common.randomness import generator, sample_generators
from fewstep.data import Data, Toy
from fewstep.flows.exact import CheckerboardField, ExactField, eight_gaussians
from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import sample, sample_noise
from fewstep.networks import MLP
from fewstep.objectives import ITVM, LMD, Objective
from fewstep.training.fit import fit

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

STEPS = (1, 2, 4, 8)
VARIANTS: dict[str, tuple[type[Objective], dict[str, Any]]] = {
    "mixed": (ITVM, {"target": "mixed"}),
    "interval (default)": (ITVM, {}),
    "integral": (ITVM, {"target": "integral"}),
    "step": (ITVM, {"target": "step"}),
    "derivative": (ITVM, {"target": "derivative"}),
    "interval, ends 0": (ITVM, {"ends": 0.0}),
    "interval, ema 0.9": (ITVM, {"ema": 0.9}),
    "interval, ema 0.999": (ITVM, {"ema": 0.999}),
    "interval, m uniform": (ITVM, {"middle": 1.0}),
    "interval, diagonal 0.25": (ITVM, {"diagonal": 0.25}),
    "interval, diagonal 0.75": (ITVM, {"diagonal": 0.75}),
    "interval, w_T 0.25": (ITVM, {"terminal_weight": 0.25}),
    "interval, error in velocity": (ITVM, {"error_in": "velocity"}),
    "LMD, sg[v]": (LMD, {}),
    "LMD, sg[v], ends 0.25": (LMD, {"ends": 0.25}),
    "LMD, through v": (LMD, {"through_teacher": True}),
}


Build = Callable[[], tuple[Any, FlowMap]]  # a teacher and a fresh student
Score = Callable[[Any], list[float]]  # a number for each of STEPS


def points(field: ExactField) -> tuple[Build, Data, Score, dict[str, Any]]:
    """An exact field; scored by the RMSE to its end points."""
    noise = sample_noise((20_000, 2), sample_generators(1, range(20_000)))
    truth = field.flow(noise, 0.0, 1.0, tolerance=1e-6)

    def score(model: Any) -> list[float]:
        return [float((sample(model, noise, n) - truth).square().sum(1).mean().sqrt()) for n in STEPS]

    options = {"batch": 1024, "chunk": 1024, "lr": 3e-3, "warmup": 100, "ema": 0.999}
    return lambda: (field, FlowMap(MLP(2, 128, 4, times=2))), Toy(field.data), score, options


def mnist_vit(guidance: float = 1.5) -> tuple[Build, Data, Score, dict[str, Any]]:
    """The published transformer; scored by the Frechet distance of 2000 samples in a small classifier's features."""
    import mnist_vit as example

    from fewstep.data import load_data
    from fewstep.evaluation.extractor import extract, trained_classifier
    from fewstep.evaluation.features import FeatureStatistics, frechet_distance

    train, test = (load_data("mnist", split=split) for split in ("train", "test"))
    classifier = trained_classifier(train)
    noise = sample_noise((2000, 1, 28, 28), sample_generators(1, range(2000)))
    labels = torch.arange(2000) % 10

    def features(images: torch.Tensor) -> FeatureStatistics:
        return FeatureStatistics.of(extract(classifier, images))

    real = features(test.rows(torch.arange(10_000), generator(0)).data)

    def score(model: Any) -> list[float]:
        images = [sample(model, noise, n, class_labels=labels) for n in STEPS]
        return [frechet_distance(features(x), real) for x in images]

    def build() -> tuple[Any, FlowMap]:
        teacher = example.teacher(guidance=guidance)
        return teacher, FlowMap.from_field(teacher, example.student())

    return build, train, score, {"batch": 128, "chunk": 128, "lr": 1e-3, "warmup": 100, "ema": 0.998}


def train(
    build: Build, data: Data, variant: str, seed: int, steps: int | None, cpu_seconds: float, options: dict[str, Any]
) -> tuple[Any, int, float]:
    """The averaged student after so many steps, or so much CPU time: then a short run measures the step first."""
    method, settings = VARIANTS[variant]

    def run(steps: int) -> tuple[Any, float]:
        torch.manual_seed(seed)
        teacher, student = build()
        start = time.process_time()
        result = fit(student, method(teacher, **settings), data, steps, seed=seed, quiet=True, **options)
        return result.ema, (time.process_time() - start) / steps

    steps = steps or round(cpu_seconds / run(40)[1])
    model, per_step = run(steps)
    return model, steps, per_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", choices=["checkerboard", "eight-gaussians", "mnist-vit"])
    parser.add_argument("--cpu-seconds", type=float, default=60.0, help="the same time for each")
    parser.add_argument("--steps", type=int, help="the same number of steps for each instead")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("ablation.json"))
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    exact = {"checkerboard": CheckerboardField, "eight-gaussians": eight_gaussians}
    setting = mnist_vit() if arguments.data == "mnist-vit" else points(exact[arguments.data]())
    build, data, score, options = setting
    rows: list[list[Any]] = []
    for variant in arguments.only:
        runs = [
            train(build, data, variant, seed, arguments.steps, arguments.cpu_seconds, options)
            for seed in arguments.seeds
        ]
        scores = zip(*[score(model) for model, _, _ in runs], strict=True)
        cells = [
            {"mean": statistics.mean(values), "std": statistics.stdev(values)} if len(values) > 1 else values[0]
            for values in scores
        ]
        rows.append([variant, runs[0][1], 1000 * runs[0][2], *cells])
        print(*rows[-1], flush=True)
    names = [str(n) for n in STEPS]
    spread = "{mean:.3f} ± {std:.3f}" if len(arguments.seeds) > 1 else "{:.3f}"
    write(
        arguments.out, title=f"The ablation of ITVM: {arguments.data}", columns=["variant", "steps", "ms", *names],
        rows=rows, formats={"ms": "{:.1f}", **dict.fromkeys(names, spread)},
        **here(arguments.seeds, ["By network calls; `ms` is CPU time of a step."]),
    )  # fmt: skip


if __name__ == "__main__":
    main()
