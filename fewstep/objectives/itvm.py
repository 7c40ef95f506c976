"""Initial/terminal velocity matching: distillation without a derivative of the network."""

from typing import Any

import torch
from torch import Tensor

from fewstep.errors import unknown
from fewstep.fields import VelocityField
from fewstep.objectives.base import (
    Batch,
    Loss,
    Objective,
    check_options,
    noise_of,
    rows_of,
    split_rows,
    squared_error,
    time_derivative,
)
from fewstep.paths import as_times, expand
from fewstep.randomness import Generators, uniform
from fewstep.solvers import heun_step
from fewstep.times import draw_pairs, draw_times

TARGETS = ("interval", "integral", "step", "derivative")
MIXED = {"interval": 1.0, "integral": 1.0}
ERRORS = ("auto", "velocity", "data")


class ITVM(Objective):
    """``w_I E|u(x_s, s, s) - v_s(x_s)|^2 + w_T E|u(x_s, s, t) - sg[target]|^2`` (arXiv 2505.01169).

    The first term matches the initial velocity, on diagonal rows; the second the average velocity to t, on the others,
    with a target that an EMA copy u^- of the student builds. The paper was at hand only as its abstract, so the
    targets are reconstructed from it; with ``m`` between s and t, ``X^-`` the map of u^-:

    * ``interval``: ``[(m - s) u^-(x, s, m) + (t - m) u^-(X^-_{s,m}(x), m, t)] / (t - s)``: two halves teach the whole.
    * ``integral``: ``v_m(X^-_{s,m}(x))``, m uniform in (s, t): the average velocity is the mean of the velocity along
      the path, here by one draw of it (fewstep's own; the integral form of the Lagrangian equation).
    * ``step``: the EMA map to ``m = t - h``, then one Heun step of the teacher, h up to ``step_size``.
    * ``derivative``: ``v_t(X^-) - r (t - s) d_t u^-`` by a forward-mode pass in t; unstable as it stands, so r rises
      to 1 over the first ``warmup`` of the training and the distance to u^- is normalised, ``g / (rms(g) + 0.1)``.

    No target has a gradient, and only ``derivative`` differentiates the network: fused attention, checkpointing,
    ``torch.compile`` and sharding all stay possible.

    Args:
        teacher: the frozen field.
        target: one of the above; a mapping from them to their shares of the off-diagonal rows; or ``mixed``, half
            ``interval`` and half ``integral``.
        ema: decay of the student copy in the target.
        diagonal: the share of rows on s = t.
        initial_weight, terminal_weight: w_I and w_T.
        middle: where ``interval`` cuts: m is ``s + r (t - s)`` with r uniform within ``middle / 2`` of one half.
        step_size: the largest teacher step of ``step``.
        warmup: the share of the training over which ``derivative`` takes in its derivative.
        times, ends: see :func:`fewstep.times.draw_pairs`.
        error_in: ``velocity``, as above; ``data``, the error of the data that u points to, ``x + (1 - s) u``, so a
            weight ``(1 - s)^2``; ``auto``, data for a network that predicts data, whose velocity near s = 1 is its
            output over 1 - s and would drown all else, and velocity for all others.

    Raises:
        ValueError: for an unknown target or distribution of times, or a share, weight or decay out of its range.
    """

    def __init__(
        self,
        teacher: VelocityField,
        target: str | dict[str, float] = "interval",
        ema: float = 0.99,
        diagonal: float = 0.5,
        initial_weight: float = 1.0,
        terminal_weight: float = 1.0,
        middle: float = 0.0,
        step_size: float = 0.1,
        warmup: float = 0.25,
        times: str = "uniform",
        ends: float = 0.25,
        error_in: str = "auto",
    ) -> None:
        super().__init__(teacher)
        if error_in not in ERRORS:
            raise unknown("error_in of ITVM", error_in, ERRORS)
        if target == "mixed":
            target = MIXED
        targets = {target: 1.0} if isinstance(target, str) else target
        for name in targets:
            if name not in TARGETS:
                raise unknown("target of ITVM", name, ("mixed", *TARGETS))
        in_unit = {"diagonal": diagonal, "middle": middle, "step_size": step_size, "warmup": warmup, "ends": ends}
        check_options("ITVM", times, ema=ema, **in_unit)
        if min(initial_weight, terminal_weight, *targets.values()) < 0 or sum(targets.values()) == 0:
            raise ValueError("ITVM's weights and shares of targets are not negative, and not all shares are 0")
        off = (1 - diagonal) / sum(targets.values())
        self.shares = {"initial": diagonal, **{name: off * share for name, share in targets.items()}}
        self.ema = ema
        self.initial_weight, self.terminal_weight = initial_weight, terminal_weight
        self.middle, self.step_size, self.warmup = middle, step_size, warmup
        self.times, self.ends, self.error_in = times, ends, error_in

    def forward(
        self,
        student: Any,
        batch: Batch,
        *,
        target: Any = None,
        progress: float = 0.0,
        step: int = 0,
        generator: Generators,
    ) -> Loss:
        rows, noise = len(batch), noise_of(batch, generator)
        shared = split_rows(rows, self.shares, generator, noise.device)
        parts = {name: part for name, part in shared.items() if len(part)}
        s, t = draw_pairs(rows, generator, self.times, self.ends)
        start, fraction = draw_times(rows, generator, self.times), uniform(rows, generator)
        s, t, start, fraction = (as_times(value, noise) for value in (s, t, start, fraction))
        initial = shared["initial"]
        s[initial] = t[initial] = start[initial]
        x, _ = student.path.sample(noise, batch.data, s)

        # Full precision at least: under autocast, or with a bf16 student, goals and x differ in type.
        goal = torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        with torch.no_grad():
            for name, part in parts.items():
                cond = rows_of(batch.cond, part)
                value = self._goal(name, target, x[part], s[part], t[part], fraction[part], progress, cond)
                goal[part] = value.to(goal.dtype)
        # One call for all rows; each goal was made of its own rows alone, so that no call is wasted.
        error = squared_error(student.average_velocity(x, s, t, **batch.cond), goal)
        if self.error_in == "data" or (self.error_in == "auto" and student.prediction == "data"):
            error = error * (1 - s).square()

        times = torch.stack([s, t], dim=1)
        terminal = torch.cat([part for name, part in shared.items() if name != "initial"])
        terms = {name: error[part].mean() for name, part in parts.items()}
        total = error.new_zeros(())
        if len(initial):
            total = total + self.initial_weight * terms["initial"]
        if len(terminal):
            total = total + self.terminal_weight * error[terminal].mean()
        return Loss(
            total,
            {name: term.detach() for name, term in terms.items()},
            {name: times[part] for name, part in parts.items()},
        )

    def _goal(
        self,
        name: str,
        target: Any,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        fraction: Tensor,
        progress: float,
        cond: dict[str, Tensor],
    ) -> Tensor:
        """What u(x, s, t) is to be, (B, ...), by the target of this name; ``fraction`` (B,) is uniform in [0, 1)."""
        match name:
            case "initial":
                return self.teacher(x, s, **cond)
            case "interval":
                part = 0.5 + (fraction - 0.5) * self.middle
                m = s + part * (t - s)
                first = target.average_velocity(x, s, m, **cond)
                second = target.average_velocity(x + expand(m - s, x) * first, m, t, **cond)
                weight = expand(part, x)
                return weight * first + (1 - weight) * second
            case "integral":
                m = s + fraction * (t - s)
                return self.teacher(target(x, s, m, **cond), m, **cond)
            case "step":
                # 1 - fraction lies in (0, 1]: no step is zero.
                h = torch.minimum((1 - fraction) * self.step_size, t - s)
                m = t - h
                near = target(x, s, m, **cond)
                end = heun_step(lambda x, t: self.teacher(x, t, **cond), near, m, t)
                return (end - x) / expand((t - s).clamp(min=1e-6), x)
            case "derivative":
                u, u_dot = time_derivative(lambda t: target.average_velocity(x, s, t, **cond), t)
                end = x + expand(t - s, x) * u
                ramp = min(1.0, progress / self.warmup) if self.warmup else 1.0
                residual = u - self.teacher(end, t, **cond) + ramp * expand(t - s, x) * u_dot
                rms = residual.flatten(1).square().mean(1).sqrt()
                return u - residual / expand(rms + 0.1, x)
        raise unknown("target of ITVM", name, TARGETS)
