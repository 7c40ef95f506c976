"""Data changed by a model of it: back to the noise that it comes from, on again under another condition, or from one
condition to another with no inversion at all.

Everywhere ``strength`` says how much of the way is walked, as in image-to-image pipelines: from ``t_0 = 1 - strength``
to 1. Strength 1 begins at pure noise and keeps nothing but what the noise carries; little strength keeps most.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.common.errors import shown
from fewstep.common.randomness import Generators, normal
from fewstep.flows.controlled import check_data, uncontrolled
from fewstep.flows.fields import VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Path
from fewstep.flows.sampling import check_options, placed, sample_map
from fewstep.flows.solvers import integrate

Model = FlowMap | VelocityField


class Inversion(NamedTuple):
    """``state`` (B, ...) at ``t = 1 - strength``, noise where strength is 1; ``residual`` (B,), the root mean square of
    how far going on from there under the same condition, in as many steps, ends from the data."""

    state: Tensor
    residual: Tensor


@torch.no_grad()
def invert(
    model: Model,
    data: Tensor,
    steps: int = 4,
    *,
    strength: float = 1.0,
    grid: str | Tensor | None = None,
    solver: str | None = None,
    iterations: int = 12,
    tolerance: float | None = None,
    **cond: Any,
) -> Inversion:
    """The noise (B, ...) from which a model makes this data, and how nearly it does. Deterministic.

    A field is solved as an ODE from t = 1 back. A map is undone step by step: ``X_{s,t}(z) = y`` begins at the better
    of y and the map's own way back ``X_{t,s}(y)``, which is the answer where the map was trained for t < s too (FMM),
    and goes on as the fixed point ``z <- z + y - X_{s,t}(z)``, that is ``y - (t - s) u(z, s, t)``. It contracts where
    ``(t - s) Lip(u) < 1``: more steps are shorter. Of all iterates each row keeps its best.

    A few-step map is not one-to-one: of data that it cannot make there is no such noise, and ``residual`` says so.

    Args:
        data: (B, ...), in the units of the model: latents of a latent model.
        steps: those in which the noise is to give the data again. A map takes ``iterations + 4`` calls for
            each, a field twice those of the solver.
        strength: how far back: to ``t = 1 - strength``.
        grid: of :func:`fewstep.sample`, brought to the part that is walked.
        solver: for fields: euler, midpoint, heun (if nothing is said), adaptive.
        iterations: of the fixed point of a map; 0 for the map's own way back alone.
        tolerance: the largest ``residual`` that is taken; any if not given.
        cond: the conditions that the data has, (B, ...) each.

    Raises:
        ValueError: a residual above the tolerance (or none, for a model that gives NaN), data that are not finite, a
            strength outside (0, 1], several steps of a map that only knows the way to t = 1, or as ``fewstep.sample``.

    >>> noise, residual = fewstep.invert(student, images, class_labels=labels)
    >>> edited = fewstep.sample(student, noise, steps=4, class_labels=others)
    """
    solver = solver or ("euler" if isinstance(model, FlowMap) else "heun")
    times = check_edit(model, steps, strength, grid=grid, solver=solver, shape=tuple(data.shape[1:]))
    if iterations < 0 or (tolerance is not None and not tolerance > 0):
        raise ValueError(f"iterations is {iterations}, tolerance {tolerance}: not negative, and above 0")
    data, cond = placed(model, check_data(data), cond)
    times = _beside(times, data)
    if isinstance(model, FlowMap):
        state = data
        for t, s in pairwise(times.flip(0)):
            state = _undone(partial(model, **cond), state, s, t, iterations)
    else:
        state = integrate(partial(model, **cond), data, times.flip(0), solver)
    again = _onward(uncontrolled(model), state, times, solver, **cond)
    residual = _size(again - data)
    if tolerance is not None and not (residual <= tolerance).all():
        row = int((~(residual <= tolerance)).nonzero()[0])
        raise ValueError(
            f"row {row} of the data is not inverted: from the noise that was found the model comes back to within "
            f"{float(residual[row]):.3g}, and tolerance is {tolerance:g}: more steps ({steps} now), less strength, or "
            "flow_edit, which inverts nothing"
        )
    return Inversion(state, residual)


def _undone(step: Callable[..., Tensor], y: Tensor, s: Tensor, t: Tensor, iterations: int) -> Tensor:
    """The z with ``X_{s,t}(z) = y``, row by row the best that was met."""

    def off(z: Tensor) -> Tensor:
        return y - step(z, s, t)

    back = step(y, t, s)
    off_data, off_back = off(y), off(back)
    is_back = _rows(_size(off_back) < _size(off_data), y)  # what is not finite is not
    z, error = torch.where(is_back, back, y), torch.where(is_back, off_back, off_data)
    best, least = z, _size(error)
    for _ in range(iterations):
        z = z + error
        error = off(z)
        size = _size(error)
        is_less = size < least
        best, least = torch.where(_rows(is_less, y), z, best), torch.where(is_less, size, least)
    return best


def resume(
    model: Model,
    state: Tensor,
    steps: int = 1,
    *,
    strength: float = 1.0,
    grid: str | Tensor | None = None,
    solver: str = "euler",
    gamma: float | None = None,
    generator: Generators | None = None,
    **cond: Any,
) -> Tensor:
    """Data (B, ...) from a ``state`` at ``t = 1 - strength``, as :func:`fewstep.sample` from noise at t = 0.

    Raises:
        ValueError: a state that is not finite, a strength outside (0, 1], or as ``fewstep.sample``.
    """
    options: dict[str, Any] = {"grid": grid, "solver": solver, "gamma": gamma, "shape": tuple(state.shape[1:])}
    times = check_edit(model, steps, strength, is_onward=True, **options)
    state, cond = placed(model, check_data(state), cond)
    return _onward(model, state, _beside(times, state), solver, gamma, generator, **cond)


def sdedit(
    model: Model,
    data: Tensor,
    steps: int = 1,
    *,
    strength: float = 0.5,
    grid: str | Tensor | None = None,
    solver: str = "euler",
    gamma: float | None = None,
    generator: Generators | None = None,
    **cond: Any,
) -> Tensor:
    """Noise over the data, and from there to data again, (B, ...): SDEdit, arXiv 2108.01073.

    ``x = alpha_{t0} y + sigma_{t0} eps``, then the model from ``t0 = 1 - strength`` on, under a condition of choice.
    ``steps`` calls of a map, or those of the solver.

    Args:
        generator: the source of eps, and of re-noising where gamma > 0; torch's global one if not given.
        strength, cond: how much is made anew, and as what. The others: those of :func:`fewstep.sample`.

    Raises:
        ValueError: data that are not finite, a strength outside (0, 1], or as ``fewstep.sample``.
    """
    options: dict[str, Any] = {"grid": grid, "solver": solver, "gamma": gamma, "shape": tuple(data.shape[1:])}
    times = check_edit(model, steps, strength, is_onward=True, **options)
    data, cond = placed(model, check_data(data), cond)
    generator = torch.default_generator if generator is None else generator
    times = _beside(times, data)
    x = _noised(model.path, data, times[0], generator)
    return _onward(model, x, times, solver, gamma, generator, **cond)


@torch.no_grad()
def flow_edit(
    model: Model,
    data: Tensor,
    source: dict[str, Any],
    target: dict[str, Any],
    steps: int = 1,
    *,
    strength: float = 0.7,
    average: int = 1,
    sampled: int = 0,
    grid: str | Tensor | None = None,
    solver: str = "euler",
    generator: Generators | None = None,
) -> Tensor:
    """Data (B, ...) carried from a condition to another, with no inversion: FlowEdit, arXiv 2412.08629.

    From ``z = y`` at ``t0 = 1 - strength``, for each step from t to t', with fresh noise each time::

        x^src = alpha_t y + sigma_t eps           where the data would be
        x^tar = x^src + z - y                     where what it has become would be
        z    += [X^tar_{t,t'}(x^tar) - x^tar] - [X^src_{t,t'}(x^src) - x^src]

    A step of a field is the solver's, so Euler's gives the paper's ``(t' - t) (v^tar - v^src)``; that a map takes it in
    one call is ours. With maps it is exact for shifted Gaussians in one step, whatever the noise: Euler needs hundreds.

    Args:
        source, target: the conditions that the data has, and those that it is to have, (B, ...) each: class labels,
            what ``model.text.encode`` gives, ``guidance`` (B,) for a guided field or a map that takes it.
        steps: pairs of calls (a field: of calls of the solver), each ``average`` times.
        average: over how many draws of the noise each step is averaged (n_avg).
        sampled: how many steps at the end sample from x^tar instead, as after SDEdit (n_min); all of them are SDEdit.
        strength, grid, solver, generator: as in :func:`sdedit`.

    Raises:
        ValueError: an average below 1, ``sampled`` outside 0 to ``steps``, several steps of a map that only knows the
            way to t = 1, or as :func:`sdedit`.
    """
    times = check_edit(model, steps, strength, grid=grid, solver=solver, shape=tuple(data.shape[1:]))
    if average < 1 or not 0 <= sampled <= steps:
        raise ValueError(f"average is {average}, sampled {sampled}: at least 1, and 0 to the {steps} steps")
    start = check_data(data)
    data, source = placed(model, start, source)
    _, target = placed(model, start, target)
    generator = torch.default_generator if generator is None else generator
    times = _beside(times, data)

    def moved(x: Tensor, ends: Tensor, cond: dict[str, Any]) -> Tensor:
        return _onward(model, x, ends, solver, **cond) - x

    z = data
    for i in range(steps - sampled):
        ends, change = times[i : i + 2], torch.zeros_like(z)
        for _ in range(average):
            x_source = _noised(model.path, data, times[i], generator)
            x_target = x_source + (z - data)
            change += moved(x_target, ends, target) - moved(x_source, ends, source)
        z = z + change / average
    if not sampled:
        return z
    x = _noised(model.path, data, times[steps - sampled], generator) + (z - data)
    return _onward(model, x, times[steps - sampled :], solver, **target)


def check_edit(model: Model, steps: int, strength: float, *, is_onward: bool = False, **options: Any) -> Tensor:
    """The times of the steps from ``1 - strength`` to 1, (N + 1,), once it is clear that a model takes them, and these
    options.

    Args:
        is_onward: it goes to t = 1 from there, and no step of it is held against another.

    Raises:
        ValueError: it does not.
    """
    times = check_options(model, steps, **options)
    if not 0 < strength <= 1:
        said = "above 0, which keeps all, and at most 1, which begins at noise"
        raise ValueError(f"strength is {shown(strength)}: {said}")
    if len(times) > 2 and not is_onward and isinstance(model, FlowMap) and model.gamma == 1:
        raise ValueError(
            f"{len(times) - 1} steps: this map only knows the way to t = 1 (a consistency model), and stops at no time "
            "between: take 1 step, or sdedit, which re-noises"
        )
    return (1 - strength) + strength * times.double()


def _beside(times: Tensor, x: Tensor) -> Tensor:
    return times.to(x.device, torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def _onward(
    model: Model,
    x: Tensor,
    times: Tensor,
    solver: str,
    gamma: float | None = 0.0,
    generator: Generators | None = None,
    **cond: Any,
) -> Tensor:
    """The state at the last of the times, from x at the first."""
    if isinstance(model, FlowMap):
        return sample_map(model, x, times, gamma=model.gamma if gamma is None else gamma, generator=generator, **cond)
    return integrate(partial(model, **cond), x, times, solver)


def _noised(path: Path, data: Tensor, t: Tensor, generator: Generators) -> Tensor:
    path.check_noise("noise added to an image")
    return path.alpha(t).to(data.dtype) * data + path.sigma(t).to(data.dtype) * normal(data, generator)


def _rows(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (x.ndim - 1))


def _size(x: Tensor) -> Tensor:
    """The root mean square of each row, (B,)."""
    return x.flatten(1).to(torch.promote_types(x.dtype, torch.float32)).square().mean(1).sqrt()
