"""When: how training draws its times, and the grids that sampling steps along."""

import math
from functools import cache

import torch
from torch import Tensor

from fewstep.common.errors import shown, unknown
from fewstep.common.randomness import Generators, uniform
from fewstep.flows.paths import Linear, Path
from fewstep.flows.token_times import time_decided

# How times are distributed, and the numbers of each where none are said.
_NUMBERS: dict[str, tuple[float, ...]] = {
    "uniform": (), "logit-normal": (0.0, 1.0), "power": (1.0,), "mirrored-power": (1.0,), "gap": (0.0, 1.0),
    "calls": (0.75,), "tokens": (27.0, 0.75),
}  # fmt: skip
_CALLS = 4  # grids of 1, 2, 4, 8 steps
DISTRIBUTIONS = tuple(_NUMBERS)
GRIDS = ("uniform", "shifted", "quadratic")
_MOST_STEPS = 1_000_000


# Before a distribution: times as it has them, then moved as the model's own scheduler moves those of its steps.
NATIVE = "native"


def without_native(distribution: str) -> tuple[str, bool]:
    """A distribution without ``native`` before it, and whether that was there; ``native`` alone is of uniform times."""
    first, _, rest = distribution.strip().partition(" ")
    return (rest.strip() or "uniform", True) if first == NATIVE else (distribution, False)


@cache
def read_times(distribution: str, known: tuple[str, ...] = DISTRIBUTIONS) -> tuple[str, tuple[float, ...]]:
    """The name and the numbers of a distribution, said as ``logit-normal`` or ``logit-normal(-0.4, 1)``.

    Args:
        known: what an error lists, of which ``native`` is one only where times are moved.

    Raises:
        ValueError: it is not known, or not with these numbers.
    """
    name, bracket, rest = distribution.replace(" ", "").partition("(")
    if name not in _NUMBERS:
        raise unknown("distribution of times", distribution, known)
    wanted = _NUMBERS[name]
    try:
        numbers = tuple(float(part) for part in rest.removesuffix(")").split(",")) if bracket else wanted
    except ValueError:
        numbers = ()
    is_closed = bool(bracket) == rest.endswith(")")
    spread = numbers[-1] if numbers else 1.0  # a deviation, or a power
    is_share = name not in ("calls", "tokens") or spread <= 1
    if (
        len(numbers) != len(wanted)
        or not is_closed
        or not all(map(math.isfinite, numbers))
        or spread <= 0
        or not is_share
    ):
        way = f"{name}({', '.join(f'{number:g}' for number in wanted)})" if wanted else name
        most = " and at most 1" if name in ("calls", "tokens") else ""
        raise ValueError(f"times {distribution!r}: say {way}, the last number above 0{most}")
    return name, numbers


def draw_times(rows: int, generators: Generators, distribution: str = "uniform") -> Tensor:
    """Times in [0, 1), shape (rows,):

    * uniform;
    * logit-normal(mean, deviation): ``sigmoid(mean + deviation z)``, most of the weight in the middle
      (arXiv 2403.03206); mean > 0 is towards data, and noise levels that are lognormal(m, d) are logit-normal(-m, d)
      on the linear path;
    * power(k): density ``(k + 1) t^k``, towards data; mirrored-power(k): the same towards noise;
    * gap(mean, deviation), calls(share): say how intervals are drawn (:func:`draw_pairs`); single times are uniform;
    * tokens(V, share): as calls(share), of times at which tokens of a vocabulary of V are decided evenly
      (``fewstep.flows.token_times``).

    ``native`` before one of them, as in ``native logit-normal(0, 1)``, is for objectives, which move the times so as
    the scheduler of their model does (``fewstep.objectives.native``); here it changes nothing.

    Raises:
        ValueError: if the distribution is not known.
    """
    name, numbers = read_times(without_native(distribution)[0])
    u = uniform(rows, generators)
    match name:
        case "logit-normal":
            return _logit_normal(u, *numbers)
        case "power":
            return u ** (1 / (numbers[0] + 1))
        case "mirrored-power":
            return 1 - (1 - u) ** (1 / (numbers[0] + 1))
        case "tokens":
            return time_decided(u, int(numbers[0]))
    return u


def _logit_normal(u: Tensor, mean: float, deviation: float) -> Tensor:
    # In float64: the vector units of a CPU and its scalar one, which takes what is left over, differ in the last bit of
    # a function, and rows are to have the same times in chunks of any size.
    normal = math.sqrt(2) * torch.erfinv((2 * u.double() - 1).clamp(-0.999999, 0.999999))
    return torch.sigmoid(mean + deviation * normal).to(u.dtype)


def draw_pairs(
    rows: int, generators: Generators, distribution: str = "uniform", ends: float = 0.0, longest: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Pairs s <= t, each (rows,): two draws, sorted; of ``gap(mean, deviation)`` first their length, logit-normal, then
    their place, uniform (as in arXiv 2506.14603). ``calls(share)`` gives this share of the rows an interval of sampling
    in 1, 2, 4 or 8 equal steps, each number as often: ``k / n`` to ``(k + 1) / n``.

    Args:
        ends: with this probability s becomes 0, and with this one (of its own) t becomes 1: the times of one-step
            sampling, which otherwise have probability 0.
        longest: the strip ``t - s <= longest``: intervals shrink by this factor, and their places spread to fill it.
            (Of two sorted uniform numbers, s is uniform on [0, 1 - (t - s)], and stays so.) Ends then go as far as
            the strip reaches.
    """
    distribution, _ = without_native(distribution)
    name, numbers = read_times(distribution)
    if name == "tokens":
        pairs = draw_pairs(rows, generators, f"calls({numbers[1]})", ends, longest)
        s, t = (time_decided(times, int(numbers[0])) for times in pairs)
        return s, t
    first, second = (draw_times(rows, generators, distribution) for _ in range(2))
    if name == "gap":
        length = _logit_normal(first, *numbers)
        s = second * (1 - length)
        t = (s + length).clamp(max=1.0)
    else:
        s, t = torch.minimum(first, second), torch.maximum(first, second)
    if name == "calls":
        is_step, steps = uniform(rows, generators) < numbers[0], 2.0 ** (_CALLS * uniform(rows, generators)).floor()
        step = (steps * uniform(rows, generators)).floor()
        s, t = torch.where(is_step, step / steps, s), torch.where(is_step, (step + 1) / steps, t)
    if longest < 1:
        length = longest * (t - s)
        s = s * (1 - length) / (1 - (t - s)).clamp(min=1e-9)
        t = s + length
    if ends > 0:
        first = (t - longest).clamp(min=0.0) if longest < 1 else 0.0
        s = torch.where(uniform(rows, generators) < ends, first, s)
        last = (s + longest).clamp(max=1.0) if longest < 1 else 1.0
        t = torch.where(uniform(rows, generators) < ends, last, t)
    return s, t


def gaussian_grid(steps: int, std: float = 1.0, path: Path | None = None) -> Tensor:
    """The best grid of Euler steps on the linear path for Gaussian data of deviation ``std`` on each axis (steps + 1,).

    It is uniform in the angle ``tan theta = sigma / (std alpha)``: a step multiplies the deviation by
    ``cos(theta) cos(theta' - theta) / cos(theta')`` where the flow does by ``cos(theta) / cos(theta')``, and of all
    products of N such cosines that of equal angles is nearest to 1. So N steps end with ``std cos^N(pi / 2N)``. It is
    the arctan schedule of arXiv 2404.14507, and for std = 1 uniform time of the trigonometric path.

    Args:
        path: on which the same noise levels are wanted; the linear one by default.

    Raises:
        ValueError: as :func:`step_grid`; a deviation that is not positive.
    """
    if not 0 < std < math.inf:
        raise ValueError(f"the deviation of the data is {std:g}: a positive number is needed, such as gaussian(0.5)")
    angle = step_grid(steps) * (math.pi / 2)
    # sin of both, so that each is exactly 0 at its end.
    times = (path or Linear()).time_of(angle.sin(), std * angle.flip(0).sin())
    times[0], times[-1] = 0, 1  # where a schedule begins with some data, or ends with some noise, too
    return times


def check_grid(what: str, times: Tensor) -> None:
    """That these are the times of steps: two at least, rising from 0 to 1.

    Raises:
        ValueError: they are not.
    """
    if times.ndim != 1 or len(times) < 2 or not (times.diff() > 0).all() or times[0] != 0 or times[-1] != 1:
        raise ValueError(f"{what} rise from 0 to 1, these are {shown(times.tolist())}")


def step_grid(steps: int, kind: str = "uniform", shift: float = 3.0) -> Tensor:
    """``steps + 1`` times from 0 to 1, float64.

    * uniform;
    * shifted: ``u / (u + shift (1 - u))`` of uniform u: steps crowd at the noise for ``shift > 1`` (arXiv 2403.03206);
    * quadratic: ``1 - (1 - u)^2``: steps crowd at the data.

    Raises:
        ValueError: if steps is not positive, or more than a million, or the kind is not known.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: at least one is needed")
    if steps > _MOST_STEPS:
        raise ValueError(f"steps is {shown(steps)}: {_MOST_STEPS:,} at most")
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    match kind:
        case "uniform":
            return u
        case "shifted":
            return u / (u + shift * (1 - u))
        case "quadratic":
            return 1 - (1 - u) ** 2
    raise unknown("step grid", kind, GRIDS)
