"""A critic that sees real and made rows through a random amount of noise: Diffusion-GAN."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.common import distributed
from fewstep.common.errors import unknown
from fewstep.common.randomness import Generators, normal, uniform
from fewstep.flows.broadcasting import expand

LEVELS = ("priority", "uniform")
_BETAS = (1e-4, 2e-2)


class Diffused(nn.Module):
    """``D(y, level)`` of ``y = sqrt(a_k) x + sqrt(1 - a_k) sd e``, with ``level = sqrt(1 - a_k)`` and e standard normal
    (arXiv 2206.02262): real and made rows overlap once there is noise on both, so the critic has a slope between them.

    ``a_k`` is the product of ``1 - beta`` up to step k of T, beta linear from 1e-4 to 0.02. Half of the rows have
    k = 0; the others draw k in 1 ... T with ``P(k) ~ k`` (``priority``) or uniformly. How much noise there is at most
    follows from how sure the critic is of real rows::

        r = E sign D(real)      p <- clip(p + sign(r - target) rows / images, 0, 1)
        T = round(steps[0] + p (steps[1] - steps[0]))

    Logits of a relativistic loss have no zero: there ``D(real) - D(made)`` takes the place of ``D(real)``, and a pair
    has one level. The authors' code draws k for a table of 64 slots after each change of T, and gives step 1 the
    probability 0 in ``priority``; here each row draws for itself, and step 1 has its share. State (p, and what was
    seen since its last change) is in buffers, summed over processes.

    Args:
        critic: called ``critic(y, level=level, **cond)``, level (n,) in [0, 1], or without it where its ``forward``
            takes none. Logits: above 0 is real.
        target: of r.
        sd: of the noise, in units of the data.
        steps: T at p = 0 and at p = 1.
        images: real rows in which p goes from 0 to 1 where the critic is sure of all.
        interval: training steps between changes of p.
        levels: how k is drawn.

    Raises:
        ValueError: an option out of its range, a critic that was made without a level, or one with noise of its own.
    """

    p: Tensor
    signs: Tensor
    rows: Tensor
    changed: Tensor

    def __init__(
        self,
        critic: nn.Module,
        target: float = 0.6,
        sd: float = 0.05,
        steps: tuple[int, int] = (10, 1000),
        images: int = 100_000,
        interval: int = 4,
        levels: str = "priority",
    ) -> None:
        super().__init__()
        if levels not in LEVELS:
            raise unknown("levels of Diffused", levels, LEVELS)
        if not 1 < steps[0] <= steps[1]:
            raise ValueError(f"Diffused's steps are {steps}: the fewest, 2 or more, and the most")
        if not -1 < target < 1 or min(sd, images, interval) <= 0:
            raise ValueError("Diffused's target lies between -1 and 1, and its sd, images and interval are above 0")
        if getattr(critic, "takes_level", True) is False:
            raise ValueError(f"this {type(critic).__name__} is told no level: make it with level=True")
        if hasattr(critic, "draws"):
            raise ValueError(f"a {type(critic).__name__} puts noise on its rows by itself: take it without Diffused")
        taken = inspect.signature(critic.forward).parameters.values()
        self.told = any(p.name == "level" or p.kind is p.VAR_KEYWORD for p in taken)
        self.critic, self.target, self.sd, self.steps = critic, target, sd, steps
        self.images, self.interval, self.levels = images, interval, levels
        for name in ("p", "signs", "rows"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("changed", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, *, level: Tensor, noise: Tensor, **cond: Any) -> Tensor:
        y = expand((1 - level.square()).sqrt(), x) * x + expand(self.sd * level, x) * noise
        return self.critic(y, **cond, **({"level": level} if self.told else {}))

    def draws(self, x: Tensor, generator: Generators, step: int = 0) -> dict[str, Tensor]:
        """The level (n,) and the noise (n, ...) of rows like x, at this step of the training."""
        if torch.is_grad_enabled():
            self._change(step)
        is_clean, place = (uniform(len(x), generator).to(x.device) for _ in range(2))
        k = torch.where(is_clean < 0.5, 0, self._index(place))
        return {"level": (1 - self.kept()[k]).sqrt().to(x.dtype), "noise": normal(x, generator)}

    @property
    def most(self) -> Tensor:
        """T, a scalar."""
        return torch.round(self.steps[0] + self.p * (self.steps[1] - self.steps[0]))

    def kept(self) -> Tensor:
        """``a_k`` for k = 0 ... steps[1], of which 0 ... T are in use."""
        k = torch.arange(self.steps[1], device=self.p.device, dtype=torch.float32)
        beta = (_BETAS[0] + (_BETAS[1] - _BETAS[0]) * k / (self.most - 1)).clamp(max=_BETAS[1])
        return torch.cat([torch.ones_like(k[:1]), torch.cumprod(1 - beta, 0)])

    def _index(self, u: Tensor) -> Tensor:
        """k in 1 ... T of u uniform in [0, 1)."""
        most = self.most
        # P(at most k) is k (k + 1) / T (T + 1), or k / T.
        k = (u * most * (most + 1) * 4 + 1).sqrt().sub(1).div(2).ceil() if self.levels == "priority" else (u * most + 1)
        return k.floor().clamp(min=1).minimum(most).long()

    def see(self, real: Tensor) -> None:
        """Take in the logits (n,) of real rows, or by how much they are above those of made ones; where gradients are
        off nothing trains, and nothing is counted."""
        if torch.is_grad_enabled():
            mine = torch.stack([real.detach().sign().sum().to(self.signs), torch.full_like(self.rows, len(real))])
            signs, rows = distributed.summed(mine)
            self.signs += signs
            self.rows += rows

    @torch.no_grad()
    def _change(self, step: int) -> None:
        """Change p by what was seen since the last time, at the first call of a step and never within one: a batch in
        parts sees the noise of one in whole."""
        is_due = ((self.changed - step).abs() >= self.interval) & (self.rows > 0)
        towards = torch.sign(self.signs / self.rows.clamp(min=1) - self.target) * self.rows / self.images
        self.p += torch.where(is_due, towards, 0.0)
        self.p.clamp_(0, 1)
        self.changed.copy_(torch.where(is_due, step, self.changed))
        for seen in (self.signs, self.rows):
            seen *= ~is_due
