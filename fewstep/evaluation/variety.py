"""How different samples of one model are from each other: what a Frechet distance hides at few steps."""

from collections.abc import Mapping

import torch
from torch import Tensor

SEEDS = 64  # samples of one class, or of one prompt, that are compared with each other
_WHOLE = 1000  # of a model that is asked for nothing


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
        return {0: mean_distance(x[:_WHOLE])}
    groups = {int(label): x[labels == label][:SEEDS] for label in labels.unique()}
    return {label: mean_distance(rows) for label, rows in groups.items() if len(rows) > 1}


def diversity(own: Mapping[int, float], teacher: Mapping[int, float]) -> float | None:
    """``mean over classes c of own[c] / teacher[c]``, of the :func:`spreads` of two models: 1 is as diverse as the
    teacher, 0 one and the same sample. None where no class of both has two samples of the teacher that differ."""
    ratios = [own[label] / teacher[label] for label in own if teacher.get(label, 0.0) > 0]
    return sum(ratios) / len(ratios) if ratios else None
