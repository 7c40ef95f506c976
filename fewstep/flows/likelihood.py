"""How likely data are to a model: the log-density of what it draws from N(0, I), in nats.

Three ways. Along the ODE, ``log p1(x) = log p0(x_0) - int_0^1 div v_t(x_t) dt`` with x_t the trajectory that ends in x
(arXiv 1806.07366, 1810.01367). By the SDE of ``fewstep.flows.stochastic``, a lower bound without any derivative. By a
map, ``log p0(X_{1,0}(x)) + log |det grad X_{1,0}(x)|``.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fewstep.common.errors import shown, unknown
from fewstep.common.randomness import Generators, normal
from fewstep.flows.exact import ExactField
from fewstep.flows.fields import VelocityField, check_score, check_velocity
from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import placed
from fewstep.flows.solvers import SOLVERS, Velocity, integrate
from fewstep.flows.sources import Normal
from fewstep.flows.stochastic import Eps, strength
from fewstep.flows.times import step_grid

normal_log_prob = Normal().log_prob  # log N(x; 0, I) of each row

METHODS = ("ode", "sde", "map")
_LARGEST = 4096  # numbers in a sample whose Jacobian is taken whole
_LOST = 0.1  # how far a map may miss on the way there and back, over the size of the data


def log_likelihood(
    model: VelocityField | FlowMap,
    x: Tensor,
    *,
    method: str = "ode",
    steps: int | None = None,
    solver: str = "midpoint",
    probes: int | None = None,
    eps: Eps = "sigma",
    generator: Generators | None = None,
    tolerance: float = 1e-6,
    chunk: int = 16,
    **cond: Any,
) -> Tensor:
    """``log p(x)`` of each row under a model that draws from N(0, I), in nats, (B,), without grad.

    Density is per unit of x as it stands: of data that were brought to deviation 1 it is not that of the data. For
    images see :func:`bits_per_dim`, and add uniform noise of one level first: bytes have no density.

    Args:
        model: a field, guided or not; or a map, which ``ode`` takes for the field u(x, t, t) that it is at s = t.
        x: samples (B, ...) of any rank, float32 or float64; they go to the model's device.
        method: ``ode``: by the divergence along the trajectory back to noise. ``sde``: a lower bound in expectation, of
            what ``sample(field, eps=...)`` draws in as many steps; one call a step, no derivative. ``map``: by the
            Jacobian of X_{1,0}, of a map that was trained both ways, or of an exact field's flow; for small samples.
        steps: equal steps between data and noise; by default 100, and 1 for ``map``.
        solver: of the ODE: midpoint (two calls a step), euler, heun, or adaptive.
        probes: of the ODE, how many vectors z of random signs stand for the divergence, ``z' (grad v) z``, each drawn
            once and kept along the whole solve (Hutchinson; arXiv 1810.01367): unbiased, at one backward call a probe
            beside each call. By default exact, at one for each number of a sample. Of the SDE, how many paths are
            averaged (1).
        eps: of the SDE, the strength of its noise, as in :func:`fewstep.sample`: above 0, finite, and towards the data
            no smaller than ``sigma`` by much, or the bound is far below.
        generator: where signs and noise are from, torch's global one if not given; a list with one a sample fixes each.
        tolerance: of the adaptive solver.
        chunk: how many backward calls go as one, which takes as much more memory. They go one by one in networks that
            ``torch.vmap`` does not take, as diffusers' U-Nets; 1 spares the trial.
        cond: conditions, (B, ...) each.

    Raises:
        ValueError: a method or solver that is not known or does not belong to this kind of model, x that are not finite
            or in half precision, a model that is no velocity, steps, probes or chunk below 1, strength 0; for ``map``,
            samples of more than 4096 numbers or a map that does not come back.

    >>> float(fewstep.log_likelihood(fewstep.GaussianField(torch.zeros(1), torch.eye(1)), torch.zeros(1, 1)))
    -0.9189385175704956
    """
    if steps is None:
        steps = 1 if method == "map" else 100
    _check(model, x, method, steps, solver, probes, chunk)
    x, cond = placed(model, x, cond)
    generator = torch.default_generator if generator is None else generator

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return model.velocity(x, t, **cond)

    times = step_grid(steps).flip(0).to(x.device, x.dtype)
    if method == "ode":
        return _by_ode(velocity, x, times, solver, probes, generator, tolerance, chunk)
    if method == "sde":
        return _by_sde(velocity, x, step_grid(steps), model, eps, probes or 1, generator)
    return _by_map(model, x, times, chunk, cond)


def bits_per_dim(log_p: Tensor, dims: int, level: float = 1 / 127.5) -> Tensor:
    """``-log p / (D ln 2) - log2(level)``: what a number of a sample costs in bits, once told apart by levels.

    Args:
        log_p: in nats, any shape, of x to which uniform noise of one level was added.
        dims: D, how many numbers a sample has.
        level: one step of 8 bits in the units of x: 1 / 127.5 for images in [-1, 1], 1 / 256 for [0, 1]; over the
            deviation where data were divided by it.
    """
    if dims < 1 or not 0 < level < math.inf:
        raise ValueError(f"bits a dimension need one number or more and a level above 0, not {dims} and {level}")
    return -log_p / (dims * math.log(2)) - math.log2(level)


def divergence(
    velocity: Velocity, x: Tensor, t: Tensor, signs: Tensor | None, chunk: int = 16
) -> tuple[Tensor, Tensor]:
    """``v(x, t)`` (B, ...) and its divergence (B,): exact by a vector-Jacobian product for each number of a sample, or
    the mean of ``z' (grad v) z`` over ``signs`` z (K, B, ...)."""
    v, products = _products(lambda x: velocity(x, t), x, signs, chunk)
    total = sum(((z * back).flatten(2).sum((0, 2)) for z, back in products), x.new_zeros(len(x)))
    return v, total if signs is None else total / len(signs)


def _products(
    function: Callable[[Tensor], Tensor], x: Tensor, directions: Tensor | None, chunk: int
) -> tuple[Tensor, Iterator[tuple[Tensor, Tensor]]]:
    """What a function of x (B, ...) gives, and some of the directions z (k, B, ...) at a time with ``z' (grad f)``; the
    unit directions, one for each number of a sample, where none are given."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = function(x)
    dims = x[0].numel()

    def products() -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, dims if directions is None else len(directions), chunk):
            if directions is None:
                rows = torch.arange(first, min(first + chunk, dims), device=x.device)
                z = torch.nn.functional.one_hot(rows, dims).to(x.dtype)
                z = z.reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape)
            else:
                z = directions[first : first + chunk]
            yield z, _pulled_back(y, x, z)

    return y.detach(), products()


def _pulled_back(y: Tensor, x: Tensor, z: Tensor) -> Tensor:
    """``z' (dy/dx)`` for each z of (k, B, ...)."""
    if not y.requires_grad:  # a constant
        return torch.zeros_like(z)
    told: Any = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    if len(z) > 1:
        with suppress(RuntimeError):  # some networks have no batched way back: see below
            return torch.autograd.grad(y, x, z, is_grads_batched=True, **told)[0]
    return torch.stack([torch.autograd.grad(y, x, each, **told)[0] for each in z])


def _by_ode(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    solver: str,
    probes: int | None,
    generator: Generators,
    tolerance: float,
    chunk: int,
) -> Tensor:
    shape, signs = x.shape, None
    if probes is not None:
        drawn = normal(x.new_empty(len(x), probes, *shape[1:]), generator)
        signs = torch.where(drawn < 0, -1.0, 1.0).to(x.dtype).transpose(0, 1)

    def rate(state: Tensor, t: Tensor) -> Tensor:
        """Of x and of l, ``dl = div v dt``, side by side."""
        v, div = divergence(velocity, state[:, :-1].reshape(shape), t, signs, chunk)
        return torch.cat([v.flatten(1), div[:, None]], dim=1)

    with torch.no_grad():
        start = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], dim=1)
        end = integrate(rate, start, times, solver, tolerance=tolerance)
        return normal_log_prob(end[:, :-1]) + end[:, -1]


@torch.no_grad()
def _by_sde(
    velocity: Velocity, x: Tensor, grid: Tensor, field: Any, eps: Eps, paths: int, generator: Generators
) -> Tensor:
    """``E log [p0(x_0) prod p(x_{i+1} | x_i) / q(x_i | x_{i+1})]`` along paths of the backward kernels q from x.

    Both kernels are Euler-Maruyama's, with one strength a step, that of its middle. As the steps get short it is
    ``E [log p0 - int (div b + eps |S|^2) dt]``, b = v + eps S (arXiv 2303.08797), and the martingale that belongs to
    it, which takes most of the scatter away.
    """
    path, middle = field.path, (grid[1:] + grid[:-1]) / 2
    strengths = strength(eps, path, middle)
    if not ((strengths > 0).all() and strength(eps, path, grid).isfinite().all()):
        raise ValueError(
            f"eps={shown(eps)} is 0 or infinite at a time: a bound by the SDE needs noise at every time, and no more "
            "than a step can follow; take 'sigma', 'linear' or a number"
        )
    a, s, a_dot, s_dot = (value.tolist() for value in path.coefficients(grid))
    s_middle, strengths, places = path.sigma(middle).tolist(), strengths.tolist(), grid.tolist()
    times = grid.to(x.device, x.dtype)

    def split(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """v and the noise expected, of which the score is ``-noise / s``."""
        v, det = velocity(x, times[i].expand(len(x))), a_dot[i] * s[i] - a[i] * s_dot[i]
        return v, (a_dot[i] / det) * x - (a[i] / det) * v

    total = x.new_zeros(len(x))
    first = split(x, len(places) - 1)
    for _ in range(paths):
        after, (v, noise) = x, first
        for i in reversed(range(len(places) - 1)):
            h, e = places[i + 1] - places[i], strengths[i]
            pull = e / (s[i + 1] or s_middle[i])  # any backward kernel gives a bound: without noise, the middle's score
            z = normal(x, generator)
            before = after - h * v - (h * pull) * noise + math.sqrt(2 * e * h) * z
            v, noise = split(before, i)
            there = before + h * v - (h * e / s[i]) * noise
            total += (0.5 * z.square() - (after - there).square() / (4 * e * h)).flatten(1).sum(1)
            after = before
        total += normal_log_prob(after)
    return total / paths


def _by_map(model: VelocityField | FlowMap, x: Tensor, times: Tensor, chunk: int, cond: dict[str, Any]) -> Tensor:
    def carry(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        if isinstance(model, FlowMap):
            return model(x, s, t, **cond)
        assert isinstance(model, ExactField)
        return model.flow(x, float(s), float(t))

    here, total = x, x.new_zeros(len(x))
    for s, t in pairwise(times):
        here, products = _products(lambda x, s=s, t=t: carry(x, s, t), here, None, chunk)
        jacobian = torch.cat([back.flatten(2) for _, back in products]).transpose(0, 1)  # (B, D, D)
        total += torch.linalg.slogdet(jacobian).logabsdet
    with torch.no_grad():
        back = here
        for t, s in pairwise(times.flip(0)):
            back = carry(back, t, s)
        lost = float((back - x).square().mean().sqrt() / x.square().mean().sqrt().clamp(min=1e-12))
    if not lost < _LOST:
        raise ValueError(
            f"the map does not come back: from data to noise and back it is {lost:.0%} of the data's size away. It was "
            "trained from noise to data alone, as most are: method='ode' takes its velocity (FMM trains both ways)"
        )
    return normal_log_prob(here) + total


def _check(model: Any, x: Tensor, method: str, steps: int, solver: str, probes: int | None, chunk: int) -> None:
    if not isinstance(model, VelocityField | FlowMap):
        raise ValueError(f"log_likelihood() takes a VelocityField or a FlowMap, not a {type(model).__name__}")
    model.path.check_noise("a likelihood")
    if method not in METHODS:
        raise unknown("method of log_likelihood", method, METHODS)
    if solver not in SOLVERS:
        raise unknown("solver", solver, SOLVERS)
    if min(steps, 1 if probes is None else probes, chunk) < 1:
        raise ValueError(f"steps is {steps}, probes {probes} and chunk {chunk}: one at least of each is needed")
    if x.dtype not in (torch.float32, torch.float64) or x.ndim < 2:
        raise ValueError(f"x (B, ...) in float32 or float64 is needed, not {x.dtype} of shape {tuple(x.shape)}")
    if not (good := x.flatten(1).isfinite().all(1)).all():
        raise ValueError(f"{int((~good).sum())} of {len(x)} rows of x are not finite: they have no likelihood")
    if isinstance(model, VelocityField):
        check_velocity(model, "a likelihood")
    if method == "sde":
        if not isinstance(model, VelocityField):
            raise ValueError(
                "method='sde' needs a VelocityField, whose score it takes: say method='ode' for a flow map"
            )
        check_score(model, "method='sde'")
    if method == "map":
        if not isinstance(model, FlowMap | ExactField):
            raise ValueError(f"method='map' needs a FlowMap or an exact field, not a {type(model).__name__}: say 'ode'")
        if x[0].numel() > _LARGEST:
            raise ValueError(
                f"a sample has {x[0].numel()} numbers, and a Jacobian is taken whole of {_LARGEST} at most: "
                "method='ode' with probes= takes any"
            )
