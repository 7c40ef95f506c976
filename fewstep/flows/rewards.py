"""Rewards: what samples are to have more of, as weights on the way of a population, and as a hill to climb."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.common.errors import shown
from fewstep.flows.kernels import Cond, Kernel, Known


def _straight(t: float) -> float:
    return t


@dataclass(frozen=True)
class Reward:
    """The target ``q e^(strength r)`` of ``steer``: what the model draws, q, times the exponential of a reward r.

    Args:
        reward: r, called with samples (B, ...) at t = 1; one number a sample (B,), in nats. Conditions that it names
            are given to it: ``def r(x, class_labels)``.
        schedule: how much of it counts at t, t itself if not given; 1 at t = 1. It says when weights come to differ,
            and leaves the target as it is.
        gradient: have its gradient propose where to go, which keeps more particles: one call more a step, and one
            backward pass.
        strength: a factor of the reward; 0 is no steering.
        decode: what makes of samples what the reward looks at, ``model.latents.decode`` for a reward of images and a
            latent model.

    Raises:
        ValueError: a schedule that does not end at 1, or a strength that is no finite number.

    >>> bright = fewstep.Reward(lambda images: images.mean(dim=(1, 2, 3)), strength=20)
    """

    reward: Callable[..., Tensor]
    schedule: Callable[[float], float] = _straight
    gradient: bool = False
    strength: float = 1.0
    decode: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if not callable(self.reward):
            raise ValueError(f"a reward is a function of samples (B, ...), and this is {shown(self.reward)}")
        if isinstance(self.strength, bool | str) or not math.isfinite(self.strength):
            raise ValueError(f"the strength of a reward is {shown(self.strength)}: a finite number is needed")
        if not abs(end := float(self.schedule(1.0)) - 1) < 1e-6:
            raise ValueError(f"the schedule of a reward is {1 + end:g} at t = 1: it ends at 1, where all of it counts")

    def __call__(self, x: Tensor, cond: Cond) -> Tensor:
        """``strength r`` of samples (B, ...), (B,).

        Raises:
            ValueError: the reward gives anything but one number a sample, or asks for a condition that there is not.
        """
        value = self.reward(x if self.decode is None else self.decode(x), **self._told(cond))
        if not isinstance(value, Tensor) or value.shape != x.shape[:1] or not value.is_floating_point():
            said = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)
            raise ValueError(f"the reward gave {said} for {len(x)} samples: a number for each is needed, ({len(x)},)")
        return self.strength * value.to(x.device, torch.promote_types(x.dtype, torch.float32))

    def slope(self, x: Tensor, ahead: Callable[[Tensor], Tensor], cond: Cond) -> Tensor:
        """The gradient of ``strength r(ahead(x))`` in x, (B, ...).

        Raises:
            ValueError: there is none.
        """
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = self(ahead(x), cond).sum()
            slope = torch.autograd.grad(value, x, allow_unused=True)[0] if value.requires_grad else None
        if slope is None:
            raise ValueError(
                "the reward has no gradient in its samples (it counts, or has a detach or no_grad in it): "
                "Reward(gradient=False) steers by its values alone"
            )
        return slope

    def _told(self, cond: Cond) -> Cond:
        try:
            named = list(inspect.signature(getattr(self.reward, "forward", self.reward)).parameters.values())[1:]
        except (TypeError, ValueError):  # of what is written in C
            named = []
        for each in named:
            is_optional = each.default is not each.empty or each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
            if each.name not in cond and not is_optional:
                known = ", ".join(cond) or "none"
                raise ValueError(f"the reward asks for the condition {each.name!r}; those of these samples: {known}")
        return {each.name: cond[each.name] for each in named if each.name in cond}


class RewardWalk:
    """Steps of a population towards ``q e^r``: ``dlog w = l_t r(end of x_t) - l_s r(end of x_s)``.

    Args:
        looks: whether copies are made on the way; else all of a particle's weight may come at its end.
    """

    def __init__(self, kernel: Kernel, reward: Reward, times: list[float], looks: bool) -> None:
        if reward.gradient and not kernel.renews:
            raise ValueError("Reward(gradient=True) moves the noise of a step, and there is none: gamma or eps above 0")
        self.kernel, self.reward, self.last = kernel, reward, len(times) - 1
        looks = looks or reward.gradient
        self.shares = [*(float(reward.schedule(t)) if looks else 0.0 for t in times[:-1]), 1.0]
        if not all(map(math.isfinite, self.shares)):
            raise ValueError(f"the schedule of a reward is not finite at all of t = {shown(times)}")
        self.is_finite: Tensor | None = None

    def advance(
        self, i: int, x: Tensor, known: Known, cond: Cond, draw: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Known, Tensor]:
        """Step i of x (B, ...): the next x, what is known there, and what it adds to the logarithms of the weights."""
        mean, std = self.kernel.mean_std(i, x, known, cond)
        x, log_ratio = mean, 0.0
        if std:
            noise, share = draw(mean), self.shares[i + 1]
            x = mean + std * noise
            if self.reward.gradient and share:  # noise of mean std * slope, and weights by how likely that was
                slope = share * self.reward.slope(mean, lambda m: self.kernel.ahead(i + 1, m, cond)[0], cond)
                x = x + std**2 * slope
                log_ratio = -std * inner(noise, slope) - std**2 / 2 * inner(slope, slope)
        potential, found = self._potential(i + 1, x, cond)
        if "potential" in known:
            log_ratio = log_ratio - known["potential"]
        return x, {**found, "potential": potential}, potential + log_ratio

    def _potential(self, i: int, x: Tensor, cond: Cond) -> tuple[Tensor, Known]:
        """``l r`` of where x at time i ends, (B,)."""
        if not self.shares[i]:
            return inner(x, x).new_zeros(len(x)), {}
        end, found = (x, {}) if i == self.last else self.kernel.ahead(i, x, cond)
        value = self.reward(end, cond)
        fine = value.isfinite().all()
        if self.is_finite is None:  # the first time at once, later ones are asked after the last step
            self.is_finite = fine
            self.check()
        self.is_finite = self.is_finite & fine
        return self.shares[i] * value, found

    def check(self) -> None:
        """That all rewards were numbers.

        Raises:
            ValueError: some were NaN or infinite.
        """
        if self.is_finite is not None and not self.is_finite:
            raise ValueError(
                "the reward gave NaN or an infinite number: weights need finite ones, for what is to be ruled out a "
                "large negative one"
            )


def climbed(kernel: Kernel, x: Tensor, reward: Reward, times: list[float], cond: Cond) -> Tensor:
    """``x <- X_{s,t}(x + (t - s) grad r(X_{s,1}(x)))`` along times, each row by itself, (B, ...)."""
    for i in range(len(times) - 1):
        slope = reward.slope(x, lambda x, i=i: kernel.ahead(i, x, cond)[0], cond)
        x, _ = kernel.mean_std(i, x + (times[i + 1] - times[i]) * slope, {}, cond)
    return x


def inner(x: Tensor, y: Tensor) -> Tensor:
    """The product of samples (B, ...) with others, (B,), in float32 at least."""
    return (x * y).to(torch.promote_types(x.dtype, torch.float32)).reshape(len(x), -1).sum(1)
