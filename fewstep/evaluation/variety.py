"""How different samples of one model are from each other: what a Frechet distance hides at few steps."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

SEEDS = 64  # samples of one class, or of one prompt, that are compared with each other
WHOLE = 1000  # of a model that is asked for nothing


def mean_distance(x: Tensor) -> float:
    """The mean Euclidean distance of two different rows of x (N, ...), over all pairs.

    >>> mean_distance(torch.tensor([[0.0], [1.0], [3.0]]))
    2.0

    Raises:
        ValueError: fewer than two rows.
    """
    if len(x) < 2:
        raise ValueError(f"{len(x)} rows have no distance to each other: 2 at least are needed")
    return float(torch.pdist(x.detach().flatten(1).double()).mean())


def spreads(x: Tensor, labels: Tensor | None = None) -> dict[int, float]:
    """The :func:`mean_distance` of the first 64 rows of each class, by its number; without ``labels`` (N,), of the
    first 1000 rows, as class 0. Classes with one row have none."""
    if labels is None:
        return {0: mean_distance(x[:WHOLE])}
    groups = {int(label): x[labels == label][:SEEDS] for label in labels.unique()}
    return {label: mean_distance(rows) for label, rows in groups.items() if len(rows) > 1}


class Compared:
    """The rows that :func:`spreads` looks at, of samples that come batch by batch: no others are kept."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._seen: Counter[int] = Counter()

    def add(self, x: Tensor, labels: Tensor | None = None) -> None:
        """The next samples, and their classes (N,) where these are told apart."""
        kept = []
        for row, label in enumerate([0] * len(x) if labels is None else labels.tolist()):
            self._seen[label] += 1
            kept += [row] if self._seen[label] <= (WHOLE if labels is None else SEEDS) else []
        self._rows.append(x[kept])
        self._labels += [] if labels is None else [labels[kept]]

    def spreads(self) -> dict[int, float]:
        """Those of all samples so far."""
        return spreads(torch.cat(self._rows), torch.cat(self._labels) if self._labels else None)


def diversity(own: Mapping[int, float], teacher: Mapping[int, float]) -> float | None:
    """``mean over classes c of own[c] / teacher[c]``, of the :func:`spreads` of two models: 1 is as diverse as the
    teacher, 0 one and the same sample. None where no class of both has two samples of the teacher that differ."""
    ratios = [own[label] / teacher[label] for label in own if teacher.get(label, 0.0) > 0]
    return sum(ratios) / len(ratios) if ratios else None
