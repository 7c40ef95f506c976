"""Data as what is missing to what is known already: a fine field less its coarse one, a frame less the last."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep.data.batch import Batch, is_prior
from fewstep.data.given import Around

_ROWS = 4096  # of which the spread is measured


class Residual(Around):
    """Data less a ``reference`` that their conditions hold, brought to standard deviation 1: a ``Data`` around another
    (residual space, as of arXiv 2505.17351).

    What is left varies less than the data, so that a network's errors are smaller in the data's units; nothing else
    changes, as adding the reference is exact. ``denormalize`` adds it to samples.

    Args:
        data: rows (C, ...) with the condition.
        reference: its name; of an ``image`` with more channels than the data the first C.

    Attributes:
        std: of what is left, over the first rows.
        moments: 0 and ``std``: what ``fewstep sample`` writes is what is left, in the units of the data.

    Raises:
        ValueError: no such condition, one of another shape, data that equal it, or that were normalised themselves.

    >>> data = Residual(ArrayData(fine, {"image": upsampled(coarse, 4)}))
    >>> drawn = data.denormalize(sample(student, noise, 1, image=image), image)
    """

    def __init__(self, data: Any, reference: str = "image") -> None:
        super().__init__(data)
        self.reference = reference
        if is_prior(data):
            raise ValueError("data: prior has no rows, and a residual is what these lack of a reference")
        if getattr(self.data, "moments", None) is not None:
            raise ValueError("the data were normalised by themselves, and their reference was not: drop normalize")
        self.std = 1.0
        count = _ROWS if self.size is None else min(self.size, _ROWS)
        left = self.rows(torch.arange(count), torch.Generator().manual_seed(0)).data
        self.std = float(left.double().std()) if left.numel() > 1 else 0.0
        if not self.std > 0:
            raise ValueError(
                f"the data are their condition {reference!r}, or all as far from it: nothing is left to learn"
            )

    def rows(self, index: Tensor, generator: torch.Generator) -> Batch:
        """The rows of ``index`` (n,): what the data has more than the reference, over ``std``."""
        batch = self.data.rows(index, generator)
        return replace(batch, data=(batch.data - self._known(batch.cond)) / self.std)

    @property
    def moments(self) -> tuple[float, float]:
        return 0.0, self.std

    def denormalize(self, data: Tensor, reference: Tensor) -> Tensor:
        """Samples (B, C, ...) in the units of the data, with their reference (B, C' >= C, ...)."""
        return data * self.std + self._known({self.reference: reference}).to(data)

    def _known(self, cond: dict[str, Tensor]) -> Tensor:
        if self.reference not in cond:
            raise ValueError(
                f"there is no condition {self.reference!r} to take off the data, which have {', '.join(cond) or 'none'}"
            )
        known = cond[self.reference]
        if known.shape[2:] != self.shape[1:] or known.ndim < 2 or known.shape[1] < self.shape[0]:
            raise ValueError(
                f"the condition {self.reference!r} has rows of shape {tuple(known.shape[1:])}, and the data of "
                f"{tuple(self.shape)}: scale it up to them (fewstep.data.upsampled)"
            )
        return known[:, : self.shape[0]]


def upsampled(coarse: Tensor, factor: int) -> Tensor:
    """Periodic fields (N, C, H, W) with ``factor`` times the points along each side, by bilinear interpolation between
    the middles of the squares that they are means of."""
    padded = torch.nn.functional.pad(coarse, (1, 1, 1, 1), mode="circular")
    fine = torch.nn.functional.interpolate(padded, scale_factor=factor, mode="bilinear", align_corners=False)
    return fine[..., factor:-factor, factor:-factor]
