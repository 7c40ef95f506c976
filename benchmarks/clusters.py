"""Guidance without labels: Fashion-MNIST, whose labels nobody tells, guided by clusters of the model's own features.

    python benchmarks/clusters.py FOLDER --seeds 0 1 2    # each seed is kept in FOLDER
    python benchmarks/clusters.py FOLDER --seeds          # the table, of what FOLDER has

The images are 14 x 14 (means of 2 x 2 pixels), 10,000 for training, as 196 numbers; the networks MLPs of 4 x 256, 1200
updates of 256 rows. First a model without conditions; its features are clustered (``fewstep.cluster``); then one model
is trained on the clusters as labels and one on the true labels, each with none in a tenth of the rows.

``agreement``: the normalised mutual information of clusters and true labels, for the features at several times, and for
the pixels. ``fd``: Frechet distance of 2000 samples of 20 Euler steps to 10,000 other rows, by the features of a small
classifier; labels are drawn as often as they are in the data.

Writes benchmarks/results/clusters.json and clusters-agreement.json (--out is their folder).
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from record import FOLDER, here, write
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.utils.data import TensorDataset

import fewstep
from fewstep.common.randomness import generator
from fewstep.data.conditions import Dropped
from fewstep.data.given import as_data
from fewstep.evaluation.extractor import extract, trained_classifier
from fewstep.evaluation.features import FeatureStatistics, frechet_distance
from fewstep.generation.clusters import cluster, kmeans, mutual_information
from fewstep.networks import MLP

STRENGTHS = (1.0, 1.5, 2.0, 3.0)
TIMES = (0.5, 0.7, 0.85, 0.95)


def images() -> tuple[Tensor, Tensor]:
    """20,000 rows (1, 14, 14) and their labels."""
    data = fewstep.load_data("fashion-mnist")
    rows = data.rows(torch.randperm(data.size or 0, generator=generator(5))[:20_000], generator(0))
    return avg_pool2d(rows.data, 2), rows.cond["class_labels"]


def trained(rows: Tensor, labels: Tensor | None, seed: int) -> Any:
    torch.manual_seed(seed)
    classes = 0 if labels is None else int(labels.max()) + 2
    field = fewstep.NetworkField(MLP(196, width=256, depth=4, classes=classes))
    data: Any = rows if labels is None else as_data(TensorDataset(rows, labels))
    if labels is not None:
        data = Dropped(data, 0.1, {"class_labels": classes - 1})
    settings: dict[str, Any] = {"batch": 256, "chunk": 256, "lr": 2e-3, "warmup": 50, "ema": 0.99, "quiet": True}
    return fewstep.fit(field, fewstep.FlowMatching(), data, 1200, seed=seed, **settings).ema.eval()


def judged(seed: int, judge: Any, real: FeatureStatistics) -> dict[str, Any]:
    begun = time.process_time()
    pictures, labels = images()
    rows, labels = pictures[:10_000].flatten(1), labels[:10_000]
    noise = torch.randn(2000, 196, generator=generator(seed, 7))

    def fd(model: Any, cond: dict[str, Any]) -> float:
        x = fewstep.sample(model, noise, 20, **cond).reshape(-1, 1, 14, 14)
        return frechet_distance(real, FeatureStatistics.of(extract(judge, x)))

    plain = trained(rows, None, seed)
    data = as_data(TensorDataset(rows, labels))
    found: dict[str, Any] = {"seed": seed, "none 1": fd(plain, {})}
    for at in TIMES:
        found[f"agreement at {at}"] = cluster(plain, data, 10, at=at, attempts=2, seed=seed).agreement
    found["agreement of pixels"] = mutual_information(kmeans(rows, 10, 2, seed), labels)
    for name, count in (("clusters, 10", 10), ("clusters, 30", 30), ("labels", 0)):
        own = cluster(plain, data, count, attempts=4, seed=seed) if count else None
        told = labels if own is None else own.labels
        if own is not None:
            found[f"agreement, {count} clusters"] = own.agreement
        field = trained(rows, told, seed)
        cond = {"class_labels": told[torch.randint(len(told), (2000,), generator=generator(seed, 8))]}
        for w in STRENGTHS:
            null = {"class_labels": int(told.max()) + 1}
            found[f"{name} {w:g}"] = fd(fewstep.Guided(field, w, null=null) if w != 1 else field, cond)
    return {**found, "seconds": time.process_time() - begun}


def spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    mean = float(f"{statistics.mean(values):.3g}")
    return {"mean": mean, "std": float(f"{statistics.stdev(values):.2g}") if len(values) > 1 else 0.0}


def tables(folder: Path, out: Path) -> None:
    rows = [json.loads(file.read_text()) for file in sorted(folder.glob("seed-*.json"))]
    facts, strengths = here([row["seed"] for row in rows]), [f"{w:g}" for w in STRENGTHS]

    def cell(key: str) -> Any:
        return spread([row[key] for row in rows if key in row])

    names = ("none", "clusters, 10", "clusters, 30", "labels")
    write(
        out / "clusters.json",
        title="Guidance without labels on Fashion-MNIST: Frechet distance by strength",
        formats=dict.fromkeys(strengths, "{mean} ± {std}"),
        columns=["conditions", *strengths],
        rows=[[name, *(cell(f"{name} {w}") for w in strengths)] for name in names],
        **facts,
    )
    keys = [key for key in rows[0] if key.startswith("agreement")]
    write(
        out / "clusters-agreement.json",
        title="Clusters and the true labels of Fashion-MNIST",
        formats={"agreement": "{mean} ± {std}"},
        columns=["clusters", "agreement"],
        rows=[[key.removeprefix("agreement").strip(", "), cell(key)] for key in keys],
        **facts,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Guidance by clusters of a model's own features, on Fashion-MNIST.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.seeds:
        pictures, labels = images()
        judge = trained_classifier(as_data(TensorDataset(pictures[:10_000], labels[:10_000])), args.folder)
        real = FeatureStatistics.of(extract(judge, pictures[10_000:]))
        for seed in args.seeds:
            file = args.folder / f"seed-{seed}.json"
            if not file.is_file():
                file.write_text(json.dumps(judged(seed, judge, real)))
                print(file.stem, "done", flush=True)
    tables(args.folder, args.out)


if __name__ == "__main__":
    main()
