"""Steering: samples of what a model draws times ``e^reward``, or of a product of powers of several models.

A population of samples goes from noise to data together. Each has a weight, and those of little weight are replaced by
copies of those of much (Feynman-Kac weights and resampling: sequential Monte Carlo). Nothing is trained.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.common.errors import shown
from fewstep.common.randomness import Generators, normal
from fewstep.flows.fields import VelocityField, check_score
from fewstep.flows.guided import unguided
from fewstep.flows.kernels import FieldKernel, Kernel, MapKernel
from fewstep.flows.maps import FlowMap
from fewstep.flows.mixed import Mixed, MixedWalk
from fewstep.flows.paths import Path
from fewstep.flows.population import Particles, Population
from fewstep.flows.rewards import Reward, RewardWalk, climbed
from fewstep.flows.sampling import check_options, placed, rows_of
from fewstep.flows.stochastic import Eps, kappa, strength

_MOST_NOISE = 2.0  # of the SDE of fields, where kappa is more


@torch.no_grad()
def steer(
    model: FlowMap | VelocityField,
    noise: Tensor,
    steps: int,
    target: Reward | Mixed,
    *,
    groups: int = 1,
    gamma: float | None = None,
    eps: Eps | None = None,
    ess: float = 0.5,
    greedy: bool = False,
    grid: str | Tensor | None = None,
    generator: Generators | None = None,
    **cond: Any,
) -> Particles:
    """Weighted samples of a target that the model does not draw by itself, (B, ...), without grad.

    **A reward on a flow map**, in any number of steps. The target is what gamma-sampling in these steps draws, times
    ``e^r``. From s to t the log-weight grows by ``l_t r(X_{t,1}(x_t)) - l_s r(X_{s,1}(x_s))``, l the schedule; as it
    ends at 1, all of it together is r of the particle's end. With ``Reward(gradient=True)`` the noise of a step, of
    deviation d, has the mean ``d^2 l_t grad r(X_{t,1}(.))``, and the weight pays for it. A step takes 2 calls, with the
    gradient 3, the last takes 1. With many steps this is FMTT (arXiv 2511.22688, reconstructed from its abstract).

    **A reward on a velocity field**: the same along the SDE ``dx = (v + eps S) dt + sqrt(2 eps) dW``, with the denoiser
    ``E[x1 | x_t]`` to look ahead (FK steering, arXiv 2501.06848): one call a step, with the gradient 2.

    **Mixed fields**: guidance, products and annealing that sample what they say (arXiv 2503.02819); see :class:`Mixed`.

    Args:
        model: of ``Mixed``, one of its fields, or the guided field that it is of.
        noise: (B, ...), standard normal: ``groups`` populations of B / groups particles, one after the other.
        steps: from t = 0 to t = 1; ``grid`` as for ``fewstep.sample``.
        groups: populations that know nothing of each other: one for each sample that is wanted.
        gamma: of flow maps, how much of the noise each step renews, 0 to 1; 1 if not given. With 0 copies would stay
            copies, so none are made: best-of-n, with weights.
        eps: of fields, the noise of their SDE as in ``fewstep.sample``, but 0 at t = 1: a name or a function of times.
            If not given ``min(kappa, 2)``, with the path's own kappa, ``(1 - t) / t`` on the linear one.
        ess: resample where fewer than this share of the particles are effective: 0 never, 1 after each step. After the
            last step none are.
        greedy: climb the reward instead, each row by itself: ``x <- X_{s,t}(x + (t - s) grad r(X_{s,1}(x)))``, two
            calls a step (FMRG, arXiv 2604.27147, reconstructed from its abstract). What it gives are no samples of a
            law: weights are equal, ``log_normalizer`` is NaN.
        generator: where noise and resampling are from, torch's global one if not given; a list with one a row makes a
            population independent of those beside it.
        cond: conditions, (B, ...) each; a copy of a particle has its conditions too.

    Raises:
        ValueError: one particle a population (unless greedy), an argument that belongs to another kind of model or
            target, eps that is not 0 at t = 1, or a reward that is not one finite number a sample.

    >>> reward = fewstep.Reward(lambda images: images.mean(dim=(1, 2, 3)), strength=20)
    >>> particles = fewstep.steer(student, torch.randn(4 * 16, 1, 28, 28), 4, reward, groups=4)
    >>> images = particles.draw()  # 4 images, each of 16
    """
    times = check_options(model, steps, grid=grid, gamma=gamma, eps=eps, shape=tuple(noise.shape[1:]))
    _check_population(noise, groups, ess, greedy, generator)
    noise, cond = placed(model, noise, cond)
    source = torch.default_generator if generator is None else generator

    def draw(x: Tensor) -> Tensor:
        return normal(x, source)

    if isinstance(target, Mixed):
        _check_mixed(model, target, greedy)
        walk = MixedWalk(target, times, _noise(eps, target.path), noise)
    elif not isinstance(target, Reward):
        raise ValueError(f"the target is {shown(target)}: steer takes Reward(function) or Mixed({{field: power}})")
    elif greedy:
        kernel = _kernel(model, times, 0.0, _no_noise, noise)
        return _alone(climbed(kernel, noise, target, times.tolist(), cond), groups)
    else:
        gamma = 1.0 if gamma is None else gamma
        kernel = _kernel(model, times, gamma, eps, noise)
        if not kernel.renews:
            ess = 0.0  # copies would stay copies
        walk = RewardWalk(kernel, target, times.tolist(), looks=ess > 0)

    population, x, known = Population(len(noise), groups, ess, noise, source), noise, {}
    last = len(times) - 2
    for i in range(last + 1):
        x, known, log_ratio = walk.advance(i, x, known, cond, draw)
        population.weigh(log_ratio)
        if i < last:
            rows = population.resample()
            x, known, cond = x[rows], rows_of(known, rows), rows_of(cond, rows)
    walk.check()
    particles = population.particles(x)
    if not (particles.x.isfinite().all() and particles.log_normalizer.isfinite().all()):
        raise ValueError(
            "steering gave numbers that are not finite: weaken the target, take more steps, or see whether the model "
            "gives finite samples without it"
        )
    return particles


def _kernel(model: FlowMap | VelocityField, times: Tensor, gamma: float, eps: Eps | None, like: Tensor) -> Kernel:
    model.path.check_noise("steering")
    if isinstance(model, FlowMap):
        return MapKernel(model, times, gamma, like)
    check_score(model, "steering")
    return FieldKernel(model, times, _noise(eps, model.path), like)


def _noise(eps: Eps | None, path: Path) -> Eps:
    """The noise of an SDE on a path.

    Raises:
        ValueError: it is not 0 at t = 1.
    """
    noise = (lambda t: kappa(path, t).clamp(max=_MOST_NOISE)) if eps is None else eps
    end = float(strength(noise, path, torch.tensor([0.5, 1.0], dtype=torch.float64))[1])
    if not abs(end) < 1e-6:
        which = f"the usual eps, min(kappa, {_MOST_NOISE:g})," if eps is None else f"eps={shown(eps)}"
        way = "field.on(Linear()) is on a path where it is 0" if eps is None else "eps='linear', 1 - t, leaves none"
        raise ValueError(f"{which} is {end:g} at t = 1 on {path} and leaves noise in the samples: {way}")
    return noise


def _no_noise(t: Tensor) -> Tensor:
    return torch.zeros_like(t)


def _alone(x: Tensor, groups: int) -> Particles:
    """Samples that share nothing, as particles of equal weight."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    each = torch.full((len(x),), len(x) / groups, dtype=dtype, device=x.device)
    every = torch.arange(len(x), device=x.device)
    return Particles(x, -each.log(), each[:groups][None], every, each[:groups] * math.nan)


def _check_mixed(model: Any, target: Mixed, greedy: bool) -> None:
    if isinstance(model, FlowMap):
        raise ValueError(
            "Mixed is for velocity fields in many steps: in its few steps a flow map knows no density. Steer the field "
            "that it was made from"
        )
    if model not in target.powers and unguided(model) not in target.powers:
        raise ValueError(f"the model {type(model).__name__} is none of the fields of Mixed: name one of them")
    if greedy:
        raise ValueError("greedy=True climbs a Reward; Mixed has nothing to climb")
    for field in target.powers:
        check_score(field, "Mixed")


def _check_population(noise: Tensor, groups: int, ess: float, greedy: bool, generator: Generators | None) -> None:
    rows = len(noise)
    if groups < 1 or rows % groups or not rows:
        raise ValueError(f"{rows} rows of noise cannot be shared equally by {groups} populations (groups)")
    if rows == groups and not greedy:
        raise ValueError(
            f"{groups} populations (groups) of one particle each: weights need two or more, so give more rows of "
            "noise. greedy=True climbs a reward with one"
        )
    if not 0 <= ess <= 1:
        raise ValueError(f"ess is {ess}: the share of effective particles runs from 0 (never resample) to 1")
    many = len(generator) if isinstance(generator, Sequence) else 1
    if not many or rows % many or (groups % many and many % groups):
        raise ValueError(f"{many} generators cannot be shared by {groups} populations of {rows // groups}: one a row")
