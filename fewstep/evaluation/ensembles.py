"""How good ensembles of fields are: the error of their mean, how far they are spread, and how much is in each wave.

A root mean square prefers the mean of all that may be, which is no field of its kind: read it beside the other two.
"""

import torch
from torch import Tensor


def relative_error(samples: Tensor, truth: Tensor) -> float:
    """``|x - y| / |y|``, the mean over rows (B, ...), each in the Euclidean norm."""
    _check(samples, truth)
    x, y = samples.double().flatten(1), truth.double().flatten(1)
    return float(((x - y).norm(dim=1) / y.norm(dim=1)).mean())


def crps(ensemble: Tensor, truth: Tensor) -> float:
    """The continuous ranked probability score of ensembles (M, B, ...) of what is true (B, ...), a mean over all
    components: ``E|X - y| - E|X - X'| / 2``, 0 at best, in the units of the data; with M = 1 the absolute error.

    The second mean is over pairs of different members (the fair estimate, doi 10.1002/qj.2270), so that it does not
    hang on M.
    """
    _check(ensemble[0], truth)
    x, y, members = ensemble.double(), truth.double(), len(ensemble)
    error = (x - y).abs().mean(0)
    if members > 1:
        # The sum over pairs of |x_i - x_j| by ranks.
        ranks = torch.arange(1 - members, members, 2, dtype=x.dtype, device=x.device).view(-1, *[1] * y.ndim)
        error = error - (ranks * x.sort(0).values).sum(0) / (members * (members - 1))
    return float(error.mean())


def energy_spectrum(fields: Tensor) -> Tensor:
    """Half the mean square of periodic fields (B, C, H, W), H = W, by the wave number: (H // 2 + 1,), of which entry k
    has all waves with a length nearest to k; those in the corners, beyond, are left out.

    Raises:
        ValueError: fields of another shape.
    """
    if fields.ndim != 4 or fields.shape[2] != fields.shape[3]:
        raise ValueError(f"fields of shape {tuple(fields.shape)}: (B, C, H, W) of squares is needed")
    size = fields.shape[-1]
    k = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64, device=fields.device)
    length = (k[:, None] ** 2 + k[None] ** 2).sqrt().round().long()
    power = torch.fft.fft2(fields.double()).abs().square().sum(1).mean(0) / size**4 / 2
    inside = length <= size // 2
    return torch.zeros(size // 2 + 1, dtype=power.dtype, device=power.device).index_add_(
        0, length[inside], power[inside]
    )


def spectrum_error(samples: Tensor, truth: Tensor) -> float:
    """How far the spectra of two sets of fields are apart: the root mean square of ``ln E(k) - ln E'(k)``, over the
    wave numbers from 1 on that both have."""
    ours, theirs = energy_spectrum(samples)[1:], energy_spectrum(truth)[1:]
    known = (ours > 1e-12 * ours.max()) & (theirs > 1e-12 * theirs.max())
    return float((ours[known].log() - theirs[known].log()).square().mean().sqrt())


def _check(samples: Tensor, truth: Tensor) -> None:
    if samples.shape != truth.shape:
        raise ValueError(f"samples of shape {tuple(samples.shape)} and truth of {tuple(truth.shape)}: row by row alike")
