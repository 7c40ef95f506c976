"""A frozen flow as a loss for something else: whatever renders x from parameters of its own, or the noise of an image.

Rectified flow as a prior (arXiv 2406.03293): RFDS is to a flow what score distillation is to a diffusion model; iRFDS
finds the noise of an image; RFDS-Rev does both. Each is a scalar loss for an optimizer of one's own. The model is
called without grad, so its Jacobian is never needed: memory and time are those of sampling.

All three are on the linear path, ``x_t = t x + (1 - t) e`` with v pointing to data; ``field.on(Linear())`` brings a
diffusion model there.
"""

from typing import Any

import torch
from torch import Tensor

from fewstep.common.randomness import Generators, normal, uniform
from fewstep.flows.broadcasting import expand
from fewstep.flows.fields import VelocityField
from fewstep.flows.guided import unguided
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear
from fewstep.flows.sampling import placed

Model = FlowMap | VelocityField


def rfds(
    model: Model,
    x: Tensor,
    *,
    times: tuple[float, float] = (0.02, 0.98),
    generator: Generators | None = None,
    **cond: Any,
) -> Tensor:
    """RFDS: ``mean |x - e - v_t(x_t)|^2`` with fresh noise e and a time of each row, v held fixed.

    Its gradient to x is ``2 (x - e - v) / numel``. For data N(mu, C) that is ``2 (x - mu) E[(1 - t) / C_t] / numel`` on
    average: it ends at the mean, whatever C is. It seeks modes, and all that it makes of one condition look alike.

    With a map, its average velocity ``u(x_t, t, 1)`` takes the place of v: x is drawn to where the trajectory ends, and
    not to the mean of where it may end. That is ours and not of the paper.

    Args:
        model: on the linear path; a guided field guides (the paper: 50 for images, which saturates).
        x: (B, ...) what is rendered, with grad, in the model's units (latents of a latent model).
        times: between which t is uniform. The paper narrows them from (.02, .98) to (.02, .7) on the way.
        generator: of times and noise; torch's global one if not given.
        cond: conditions of the model, (B, ...) each.

    Raises:
        ValueError: a model on another path, or times that are not in order within [0, 1).

    >>> for _ in range(800):
    ...     loss = fewstep.rfds(guided, render(parameters), class_labels=labels)
    ...     optimizer.zero_grad(), loss.backward(), optimizer.step()
    """
    _check(model, times)
    noise, t = _drawn(x, times, generator)
    velocity = _velocity(model, _between(noise, x.detach(), t), t, cond)
    return (x - noise - velocity).square().mean()


def rfds_rev(
    model: Model,
    x: Tensor,
    *,
    times: tuple[float, float] = (0.02, 0.98),
    generator: Generators | None = None,
    **cond: Any,
) -> Tensor:
    """RFDS-Rev: as :func:`rfds`, with noise that belongs to x instead of any.

    The field says what noise x would come from, ``e' = x - v_t(x_t)``, without guidance, and RFDS is taken at
    ``t x + (1 - t) e'``: two calls. Less of the noise's variance, and of its blur, is in the gradient. Its mean is
    ``-2 (x - mu) E[A_t (1 - t)^2 / C_t] / numel`` for data N(mu, C), ``A_t = (t C - (1 - t)) / C_t``, and drives x to
    mu where that expectation is negative: with late times alone it drives away.

    Arguments and errors as for :func:`rfds`.
    """
    _check(model, times)
    noise, t = _drawn(x, times, generator)
    still = x.detach()
    plain = {name: value for name, value in cond.items() if name != "guidance"}
    own = still - _velocity(unguided(model), _between(noise, still, t), t, plain)
    velocity = _velocity(model, _between(own, still, t), t, cond)
    return (x - own - velocity).square().mean()


def irfds(
    model: Model,
    x: Tensor,
    noise: Tensor,
    *,
    normality: float = 1.0,
    times: tuple[float, float] = (0.1, 0.8),
    generator: Generators | None = None,
    **cond: Any,
) -> Tensor:
    """iRFDS: the noise of an image x as a minimum, ``mean |e - (x - v_t(x_t))|^2`` over e, v held fixed, and
    ``normality`` times ``mean(e)^2 + (var(e) - 1)^2`` of each row.

    Without the latter it ends at ``e = (x - mu) E[(1 - t) / C_t] / E[t C / C_t]`` for data N(mu, C), where the ODE has
    ``(x - mu) / sqrt(C)``: the two agree for C = 1 and times that are symmetric about 1/2, and no others. A curved flow
    has blurry noise by it. :func:`fewstep.invert` has no such bias, and takes fewer calls.

    Args:
        noise: (B, ...) with grad: what is optimised. x is not.
        model: without guidance: of a guided field the field inside is asked.

    The others, and errors, as for :func:`rfds`; also if x and noise differ in shape.

    >>> noise = torch.randn_like(image).requires_grad_()
    >>> optimizer = torch.optim.AdamW([noise], lr=3e-3)
    """
    _check(model, times)
    if x.shape != noise.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}, x {tuple(x.shape)}: they must agree")
    _, t = _drawn(x, times, generator, needs_noise=False)
    plain = {name: value for name, value in cond.items() if name != "guidance"}
    still = noise.detach()
    own = x.detach() - _velocity(unguided(model), _between(still, x.detach(), t), t, plain)
    rows = noise.flatten(1)
    far = rows.mean(1).square() + (rows.var(1, correction=0) - 1).square()
    return (noise - own).square().mean() + normality * far.mean()


def _check(model: Model, times: tuple[float, float]) -> None:
    if not isinstance(model, FlowMap | VelocityField):
        raise ValueError(f"the prior is a FlowMap or a VelocityField, not a {type(model).__name__}")
    if not model.path.same_as(Linear()):
        is_map = isinstance(model, FlowMap)
        way = "take its teacher's .on(Linear())" if is_map else "field.on(Linear()) brings it there"
        raise ValueError(f"the prior is on {model.path}, and these losses are of the linear path: {way}")
    if not 0 <= times[0] <= times[1] < 1:
        raise ValueError(f"times are {times}: they rise within [0, 1), such as (0.02, 0.98)")


def _drawn(
    x: Tensor, times: tuple[float, float], generator: Generators | None, *, needs_noise: bool = True
) -> tuple[Tensor, Tensor]:
    """Noise like x, and a time of each row."""
    generator = torch.default_generator if generator is None else generator
    low, high = times
    t = low + (high - low) * uniform(len(x), generator, torch.promote_types(x.dtype, torch.float32)).to(x.device)
    return (normal(x.detach(), generator) if needs_noise else x), t


def _between(noise: Tensor, data: Tensor, t: Tensor) -> Tensor:
    t = expand(t, data)
    return t * data + (1 - t) * noise


@torch.no_grad()
def _velocity(model: Model, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
    """v_t(x) of a field; of a map, its mean from t to the data."""
    x, cond = placed(model, x, cond)
    if isinstance(model, FlowMap):
        return model.average_velocity(x, t, torch.ones_like(t), **cond)
    return model(x, t, **cond)
