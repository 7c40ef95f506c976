"""What is kept of samples that come batch by batch: little, whatever their number."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.evaluation.features import FeatureStatistics
from fewstep.evaluation.tokens import METRICS as OF_TOKENS

# Of how many samples, the first ones, a metric is: their features are kept. The others are sums over all samples.
ROWS = {
    "sliced_w2": 16_000, "energy": 5_000, "histogram_kl": 1_000_000, "feature_w2": 16_000, "kid": 50_000,
    "precision": 50_000, "recall": 50_000, **dict.fromkeys(OF_TOKENS, 50_000),
}  # fmt: skip


def is_summed(names: Sequence[str]) -> bool:
    """Whether one of these metrics is of the moments of all samples."""
    return "fd" in names or "fid" in names


def kept_rows(names: Sequence[str]) -> int:
    """Of how many samples these metrics need the features themselves."""
    return max((ROWS.get(name, 0) for name in names), default=0)


class Look(NamedTuple):
    """What a process found in a batch of samples, on the CPU.

    Attributes:
        shown: those of the samples that are shown.
        view: what is compared with the data (n, F); None where nothing is.
        squares: of the distances to the end points (n,), of the samples that have some.
        right, outside: how many are in the class that was asked for, and where the data never are.
        raw: what is compared with the rows trained on.
        labels: their classes (n,).
    """

    shown: Tensor
    view: Tensor | None = None
    squares: Tensor | None = None
    right: float = 0.0
    outside: float = 0.0
    raw: Tensor | None = None
    labels: Tensor | None = None


class Features:
    """Of the features of samples, what some metrics need: the moments of all, the first rows, or both."""

    def __init__(self, names: Sequence[str]) -> None:
        self._is_summed, self._room = is_summed(names), kept_rows(names)
        self.statistics: FeatureStatistics | None = None
        self._rows: list[Tensor] = []

    def add(self, view: Tensor) -> None:
        """The next samples, (n, F)."""
        if self._is_summed:
            self.statistics = self.statistics or FeatureStatistics.empty(view.shape[1])
            self.statistics.update(view)
        if self._room > 0:
            self._rows.append(view[: self._room])
            self._room -= len(view)

    def rows(self) -> Tensor:
        """The first of them, as many as are kept."""
        return torch.cat(self._rows)
