"""Whether samples are copies of rows that were trained on: their nearest training row, against that of held-out rows.

Three sets decide, as in Meehan et al. (arXiv 2004.05675): samples, training rows, and rows of the same source that were
not trained on, which say how near is near by chance. Their test ranks the distances ``d1`` to the nearest training row.
Blur fools that on images: a blurred image is near to many. Here it is ``d1 / d2``, with ``d2`` the distance to the
second nearest, which blur brings towards 1 and a copy towards 0.
"""

import torch
from torch import Tensor
from torch.nn import functional

from fewstep.evaluation.points import quantiles

SHARE = 0.05  # of the held-out rows, which are called near
_BLOCK = 4096  # training rows that are compared at once
_FEW = 16  # dimensions
_SIDE = 32  # pixels of the images that are compared


def memorisation(samples: Tensor, held_out: Tensor, training: Tensor, share: float = SHARE) -> float:
    """The share of samples with ``d1 / d2`` at most the ``share``-quantile of that of the held-out rows.

    ``share`` for fresh draws of the data, 1 for copies of training rows, and below ``share`` for samples that keep away
    from single rows (blur). A training row that stands in the data twice, in two slightly different forms, hides its
    copies.

    Args:
        samples, held_out, training: (N, ...), at least 1, 1 and 2 rows; compared by Euclidean distance.
    """
    limit = quantiles(nearness(held_out, training), (share,))[0]
    return float((nearness(samples, training) <= limit).double().mean())


def nearness(x: Tensor, training: Tensor) -> Tensor:
    """``d1 / d2`` of each row of x, (N,) in [0, 1], of :func:`two_nearest`; 0 where both are 0."""
    first, second = two_nearest(x, training).unbind(1)
    return torch.where(second > 0, first / second, 0.0)


def two_nearest(x: Tensor, training: Tensor) -> Tensor:
    """The distances of each row of x to the nearest and the second nearest row of ``training``, (N, 2), float64.

    Raises:
        ValueError: rows of two shapes, or fewer than two to be near to.
    """
    if x.shape[1:] != training.shape[1:] or len(training) < 2:
        raise ValueError(f"{tuple(x.shape)} cannot be near to {tuple(training.shape)}: 2 rows of one shape are needed")
    x, training = x.detach().flatten(1).float(), training.detach().flatten(1).float()
    # Matrix products are faster where there are many dimensions; they keep more digits near the origin.
    mode = "use" if x.shape[1] > _FEW else "donot_use"
    centre = training.mean(0)
    away, where = x.new_full((len(x), 2), torch.inf), torch.zeros(len(x), 2, dtype=torch.long)
    for start in range(0, len(training), _BLOCK):
        block = training[start : start + _BLOCK]
        distance = torch.cdist(x - centre, block - centre, compute_mode=f"{mode}_mm_for_euclid_dist")
        some, index = distance.topk(min(2, len(block)), largest=False)
        away, order = torch.cat([away, some], 1).topk(2, largest=False)
        where = torch.cat([where, index + start], 1).gather(1, order)
    # The two are found to rounding, and their distances are exact: a copy is at 0.
    return (x[:, None].double() - training[where].double()).norm(dim=2).sort(1).values


def comparable(x: Tensor) -> Tensor:
    """What of samples (N, ...) is compared: of images the pixels, or where they have more than 32 a side, the means
    of squares; float32 on the CPU."""
    x = x.detach().cpu().float()
    square = -(-max(x.shape[2:]) // _SIDE) if x.ndim == 4 else 1
    return functional.avg_pool2d(x, square, ceil_mode=True) if square > 1 else x
