"""Samples from a flow map or a velocity field, in as many steps as asked for.

A sampler is one function that reads like its formula; ``sample`` chooses it by what the model is.
"""

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fewstep.common.errors import shown, unknown
from fewstep.common.randomness import Generators, normal
from fewstep.flows.chains import sample_chain
from fewstep.flows.fields import VelocityField, check_score
from fewstep.flows.guided import unguided
from fewstep.flows.interpolants import DenoisedField, check_between, sample_between
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Path
from fewstep.flows.signature import check_call, device_of, shape_of
from fewstep.flows.solvers import SOLVERS, integrate
from fewstep.flows.spaces import Tokens
from fewstep.flows.stochastic import Eps, check_sde, integrate_sde
from fewstep.flows.times import GRIDS, check_grid, gaussian_grid, step_grid
from fewstep.flows.token_times import time_decided


def sample(
    model: FlowMap | VelocityField,
    noise: Tensor,
    steps: int = 1,
    *,
    grid: str | Tensor | None = None,
    solver: str = "euler",
    gamma: float | None = None,
    eps: Eps | None = None,
    last_step: str | None = None,
    generator: Generators | None = None,
    tolerance: float = 1e-5,
    **cond: Any,
) -> Tensor:
    """Data from noise, (B, ...), without grad.

    A flow map takes ``steps`` calls. A field is solved as an ODE: Euler takes ``steps`` calls, midpoint and Heun twice
    as many, adaptive as many as it needs (``count_calls`` counts them). With ``eps`` it is solved as an SDE, which has
    the same law at every time where the field is exact (``fewstep.flows.stochastic``).

    Args:
        noise: the start (B, ...), standard normal; it goes to the model's device, where the samples are then.
            ``sample_noise`` draws it sample by sample.
        steps: how many steps from t = 0 to t = 1.
        grid: uniform, shifted, quadratic; gaussian(c), the best for Gaussian data of deviation c (``gaussian_grid``; c
            is 1 where it is not said, for latents and data that were normalised); tokens, at which rows of tokens are
            decided evenly; native: where the model's own pipeline takes its steps, of a diffusion model equal ones of
            the schedule that it was trained on, as DDIM does, of a flow-match model those that its scheduler shifts, by
            the number of tokens of the noise where it does so (``fewstep.flows.shifts``); or the times themselves,
            rising from 0 to 1 (``fewstep.optimal_grid`` finds them). By default uniform, but native for a map that was
            trained at native times.
        solver: for fields: euler, midpoint, heun, adaptive. With ``eps`` euler (Euler-Maruyama), heun (weak order 2) or
            ancestral (DDPM's).
        gamma: for maps: 0 is deterministic, 1 is consistency sampling; see :func:`sample_map`. By default the map's
            own ``gamma``: 0, but 1 for a consistency model.
        eps: for fields: the strength of the noise in ``dx = (v + eps S) dt + sqrt(2 eps) dW``, a number from 0 on, a
            function of times, or by name: kappa (DDPM's), sigma, linear (1 - t), decreasing, increasing-decreasing
            (sin^2 pi t); arXiv 2303.08797, 2401.08740.
        last_step: with ``eps``: how the last step goes, mostly without noise: tweedie (the data estimate, if nothing is
            said), euler (so between two data sets), mean, none (as all others).
        generator: the source of re-noising where gamma > 0, and of the noise of ``eps``, torch's global one if not
            given; a list with one generator a sample fixes each sample.
        tolerance: of the adaptive solver.
        cond: conditions, (B, ...) each, such as ``class_labels``; they go to the model's device too.

    Raises:
        ValueError: for steps below 1, an unknown solver or grid, gamma outside [0, 1], eps below 0, a field without a
            score where there is ``eps``, or an argument that does not belong to this kind of model.

    >>> images = fewstep.sample(student, torch.randn(64, 3, 32, 32), steps=2)
    """
    shape = tuple(noise.shape[1:])
    times = check_options(
        model, steps, grid=grid, solver=solver, gamma=gamma, eps=eps, last_step=last_step, shape=shape
    )
    noise, cond = placed(model, noise, cond)
    if isinstance(model, FlowMap):
        gamma = model.gamma if gamma is None else gamma
        return sample_map(model, noise, times, gamma=gamma, generator=generator, **cond)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t, **cond)

    if model.chain:
        generator = torch.default_generator if generator is None else generator
        return sample_chain(model, noise, times, model.chain, generator=generator, **cond)
    if eps is not None and isinstance(model, DenoisedField):
        last = last_step or "euler"
        return sample_between(model, noise, times, eps, last_step=last, generator=generator, **cond)
    if eps is not None:
        last = last_step or "tweedie"
        return integrate_sde(
            velocity, noise, times, model.path, eps, solver, last_step=last, generator=generator, space=model.space
        )
    times = times.to(noise.device, torch.promote_types(noise.dtype, torch.float32))
    with torch.no_grad():
        return integrate(velocity, noise, times, solver, tolerance=tolerance, space=model.space)


def sample_states(
    model: FlowMap | VelocityField, noise: Tensor, steps: int, *, solver: str = "euler", **cond: Any
) -> Tensor:
    """The noise and the states after each of ``steps`` equal steps, (B, steps + 1, ...): the last are, to the bit, what
    ``sample`` gives on a uniform grid, without noise in between. Arguments and errors as there."""
    times = check_options(model, steps, grid="uniform", solver=solver)
    x, cond = placed(model, noise, cond)
    times = times.to(x.device, torch.promote_types(x.dtype, torch.float32))
    states = [x]
    with torch.no_grad():
        for i in range(steps):
            ends = times[i : i + 2]
            if isinstance(model, FlowMap):
                states.append(sample_map(model, states[-1], ends, **cond))
            else:
                x = states[-1]
                states.append(integrate(lambda x, t: model(x, t, **cond), x, ends, solver, space=model.space))
    return torch.stack(states, dim=1)


def placed(model: FlowMap | VelocityField, noise: Tensor, cond: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Noise and conditions where the model is, the strength of guidance among them for a map that takes one.

    Raises:
        ValueError: a condition of more or fewer rows than the noise, or what :func:`check_call` refuses.
    """
    for name, value in cond.items():
        if isinstance(value, Tensor) and value.ndim and len(value) != len(noise):
            raise ValueError(
                f"the condition {name!r} has {len(value)} rows, the noise {len(noise)}: one each is needed"
            )
    device = device_of(model, noise.device)
    noise = noise.to(device)
    cond = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in cond.items()}
    if isinstance(model, FlowMap) and model.guidance is not None and "guidance" not in cond:
        cond["guidance"] = noise.new_full((len(noise),), model.guidance)
    check_call(model, noise, cond)
    return noise, cond


def rows_of(cond: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """Some rows of conditions; what is one for all of them stays."""
    return {name: value[rows] if isinstance(value, Tensor) and value.ndim else value for name, value in cond.items()}


def check_options(
    model: FlowMap | VelocityField,
    steps: int,
    *,
    grid: str | Tensor | None = None,
    solver: str = "euler",
    gamma: float | None = None,
    eps: Eps | None = None,
    last_step: str | None = None,
    shape: tuple[int, ...] | None = None,
    **_: Any,
) -> Tensor:
    """The times of the steps (N + 1,), once it is clear that ``sample`` takes these options for this model.

    Raises:
        ValueError: it does not.
    """
    if isinstance(model, FlowMap):
        if solver != "euler":
            raise ValueError(f"a flow map takes its steps itself: solver={solver!r} is for velocity fields")
        if eps is not None:
            raise ValueError(
                f"eps={shown(eps)} is noise along the ODE of a velocity field; a flow map has gamma (0 to 1)"
            )
        _check_gamma(gamma or 0.0)
        if gamma and model.path.two_sided:
            raise ValueError(f"gamma={gamma} brings noise back between steps, and between two data sets there is none")
        if model.ends_alone and gamma not in (None, 1):
            raise ValueError(
                f"gamma={gamma} asks for times before t = 1, and this map knows X_(s,1) alone: leave it out"
            )
        if gamma and not model.path.is_affine:
            raise ValueError(f"gamma={gamma} brings noise back between steps, and a chain of blocks has no noised data")
    elif not isinstance(model, VelocityField):
        raise ValueError(f"sample() takes a FlowMap or a VelocityField, not a {type(model).__name__}")
    elif gamma:
        raise ValueError(f"gamma={gamma} re-noises between the steps of a flow map; a field is solved as an ODE")
    elif eps is not None:
        check_score(model, f"eps={shown(eps)}")
        if isinstance(model, DenoisedField):
            check_between(eps, model.path, solver, last_step or "euler")
        else:
            check_sde(eps, model.path, solver, last_step or "tweedie")
    elif solver not in SOLVERS:
        raise unknown("solver", solver, SOLVERS)
    if last_step is not None and eps is None:
        raise ValueError(f"last_step={last_step!r} is how a sampler with noise ends: give eps too")
    return grid_times(model, steps, grid, shape)


def _check_gamma(gamma: float) -> None:
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma is {gamma}: it runs from 0 (deterministic) to 1 (consistency sampling)")


@torch.no_grad()
def sample_map(
    model: FlowMap,
    noise: Tensor,
    times: Tensor,
    *,
    gamma: float = 0.0,
    generator: Generators | None = None,
    **cond: Any,
) -> Tensor:
    """``x <- X_{t_i, t_{i+1}}(x)`` along ``times``, re-noising by ``gamma`` (arXiv 2310.02279, their gamma-sampling).

    From t_i to t_j the map goes on to r > t_j, ``sigma_r / alpha_r = sqrt(1 - gamma^2) sigma_j / alpha_j``, and fresh
    noise brings it back: ``x <- (alpha_j / alpha_r) X_{i,r}(x) + gamma sigma_j eps``. The last step takes none.

    Raises:
        ValueError: if gamma is outside [0, 1].
    """
    _check_gamma(gamma)
    generator = torch.default_generator if generator is None else generator
    x = noise
    times = times.to(torch.promote_types(x.dtype, torch.float32))
    is_end = (times == 1).tolist()  # asked once, so that no step waits for a GPU
    for (t, t_next), is_last in zip(pairwise(times.to(x.device)), is_end[1:], strict=True):
        if gamma == 0 or is_last:
            x = model(x, t, t_next, **cond)
            continue
        r, shrink, fresh = beyond(model.path, t_next, gamma)
        x = shrink * model(x, t, r, **cond) + fresh * normal(x, generator)
    return x


def beyond(path: Path, t: Tensor, gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """The time r with noise ratio ``sqrt(1 - gamma^2)`` of that at t, ``alpha_t / alpha_r``, and the noise to add."""
    a, s = path.alpha(t), path.sigma(t)
    r = path.time_of(a, math.sqrt(1 - gamma * gamma) * s)
    shrink = a / path.alpha(r)
    # gamma sigma_t, except where a schedule ends before that r: then what is missing of the noise at t.
    return r, shrink, (s * s - (shrink * path.sigma(r)) ** 2).clamp(min=0).sqrt()


def sample_noise(shape: tuple[int, ...], generators: Generators, dtype: torch.dtype = torch.float32) -> Tensor:
    """The noise that samples start from, shape (B, ...); see ``fewstep.common.randomness.sample_generators``."""
    return normal(torch.empty(shape, dtype=dtype), generators)


def grid_times(
    model: Any, steps: int, grid: str | Tensor | None = None, shape: tuple[int, ...] | None = None
) -> Tensor:
    """The times (steps + 1,) at which :func:`sample` takes its steps.

    Args:
        grid: as there.
        shape: of one sample; by default what the model says.

    Raises:
        ValueError: a grid that is not known, or no number of steps.
    """
    grid = getattr(model, "grid", "uniform") if grid is None else grid
    if isinstance(grid, str):
        if grid == "native" and (shift := getattr(unguided(model), "shift", None)) is not None:
            step_grid(steps)  # which refuses numbers that are none
            times = shift.grid(steps, shift.tokens(shape_of(model) if shape is None else shape))
            return model.path.time_of(times, 1 - times)
        if grid == "native" and (native := getattr(unguided(model), "native", None)) is not None:
            times = step_grid(steps)
            inner = native.coefficients(times[1:-1])
            times[1:-1] = model.path.time_of(*inner[:2])
            return times
        if grid.startswith("gaussian"):
            return gaussian_grid(steps, _deviation(grid, model), model.path)
        if grid == "tokens" and isinstance(model.space, Tokens):
            return time_decided(step_grid(steps), model.space.size)
        if grid == "optimal":
            raise ValueError("grid='optimal' is found first: grid=fewstep.optimal_grid(model, teacher, noise, steps)")
        if grid not in GRIDS:
            raise unknown("step grid", grid, (*GRIDS, "gaussian", "native", "tokens"))
        return step_grid(steps, grid)
    if not isinstance(grid, Tensor):
        raise ValueError(f"grid={shown(grid)}: the times are a tensor, as in torch.tensor([0, 0.4, 1]), or a name")
    check_grid("the times of a grid", grid)
    return grid


def _deviation(grid: str, model: Any) -> float:
    """The deviation of the data that a Gaussian grid names, or 1 for a model of data that were brought to it."""
    if found := re.fullmatch(r"gaussian\(([0-9.e+-]+)\)", grid.replace(" ", "")):
        with suppress(ValueError):
            return float(found[1])
    if grid != "gaussian":
        raise ValueError(f"grid={grid!r}: say gaussian(0.5), the number being the standard deviation of the data")
    if model.moments is None and model.latents is None:
        raise ValueError(
            "grid='gaussian' needs the standard deviation of the data, which is not known of this model: say it, as in "
            "gaussian(0.5)"
        )
    return 1.0
