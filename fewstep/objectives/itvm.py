"""Initial/terminal velocity matching: distillation without a derivative of the network."""

from typing import Any

import torch
from torch import Tensor

from fewstep.common.errors import unknown
from fewstep.common.randomness import Generators, chunk_rows
from fewstep.data.batch import Batch
from fewstep.flows.broadcasting import expand
from fewstep.flows.fields import NetworkField, VelocityField
from fewstep.flows.guided import unguided
from fewstep.flows.maps import FlowMap
from fewstep.objectives.base import Index, check_decay, check_options
from fewstep.objectives.compositions import near_the_end, through_middle
from fewstep.objectives.rows import Now, Rows
from fewstep.objectives.trajectory import check_solver, check_states, given, on_the_way, shared
from fewstep.objectives.two_time import TwoTime
from fewstep.objectives.weights import normalized, warmed

TARGETS = ("interval", "integral", "step", "derivative", "trajectory")
MIXED = {"interval": 1.0, "integral": 1.0}


class ITVM(TwoTime):
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
    * ``trajectory``: the chord ``(x_t - x_s) / (t - s)`` of a trajectory of the teacher, with nothing of the student in
      it: stored, or solved from noise, as :class:`Trajectory` has it. These rows are at its states.

    No target has a gradient, and only ``derivative`` differentiates the network: fused attention, checkpointing,
    ``torch.compile`` and sharding all stay possible.

    Args:
        teacher: the frozen field.
        target: one of the above; a mapping from them to their shares of the off-diagonal rows; or ``mixed``, half
            ``interval`` and half ``integral``.
        ema: decay of the student copy in the target. A fast copy learns faster: ``docs/benchmarks/itvm-ablation.md``.
        diagonal: the share of rows on s = t; if not given 0.5, and 0.75 for a teacher without a network (an exact
            field), whose velocity the student has to learn from the beginning.
        initial_weight, terminal_weight: w_I and w_T.
        middle: where ``interval`` cuts: m is ``s + r (t - s)`` with r uniform within ``middle / 2`` of one half.
        step_size: the largest teacher step of ``step``.
        warmup: the share of the training over which ``derivative`` takes in its derivative.
        solver_steps: Heun steps of each trajectory of ``trajectory``.
        reuse: how many of its rows share one, at different s and t.
        starts, times, ends, adaptive, options: see :class:`TwoTime`. With ``starts: prior`` the map is learned from
            t = 0 alone, and ``interval``, which asks for it from the middle on, is refused.

    Raises:
        ValueError: for an unknown target or distribution of times, or a share, weight or decay out of its range.
    """

    diagonal_term = "initial"
    sources = ("2505.01169",)

    def __init__(
        self,
        teacher: VelocityField,
        target: str | dict[str, float] = "interval",
        ema: float = 0.5,
        diagonal: float | None = None,
        initial_weight: float = 1.0,
        terminal_weight: float = 1.0,
        middle: float = 0.0,
        step_size: float = 0.1,
        warmup: float = 0.25,
        solver_steps: int = 16,
        reuse: int = 8,
        times: str = "calls(0.75)",
        ends: float = 0.0,
        starts: str = "data",
        adaptive: float = 0.0,
        error_in: str = "auto",
        jvp: str = "forward",
    ) -> None:
        if diagonal is None:
            diagonal = 0.5 if isinstance(unguided(teacher), NetworkField) else 0.75
        weights = (initial_weight, terminal_weight)
        super().__init__(
            teacher, diagonal=diagonal, times=times, ends=ends, adaptive=adaptive, error_in=error_in, weights=weights,
            jvp=jvp, starts=starts,
        )  # fmt: skip
        if target == "mixed":
            target = MIXED
        targets = {target: 1.0} if isinstance(target, str) else target
        for name in targets:
            if name not in TARGETS:
                raise unknown("target of ITVM", name, ("mixed", *TARGETS))
        check_options("ITVM", times, middle=middle, step_size=step_size, warmup=warmup)
        if "step" in targets and step_size == 0:
            raise ValueError("ITVM's step_size is 0: a step of no length teaches nothing, take 0.1")
        if starts == "prior" and targets.get("interval"):
            raise ValueError(
                "ITVM's target interval asks for the map from the middle of the way, and starts: prior trains it from "
                "t = 0 alone: say starts: own, or target: integral"
            )
        check_solver("ITVM", "heun", solver_steps, reuse)
        if not targets or min(targets.values()) < 0 or sum(targets.values()) == 0:
            raise ValueError("ITVM's shares of targets are not negative, and not all shares are 0")
        off = (1 - diagonal) / sum(targets.values())
        self.any_space = not {"step", "derivative", "trajectory"} & {name for name, share in targets.items() if share}
        self.shares = {self.diagonal_term: diagonal, **{name: off * share for name, share in targets.items()}}
        self.ema = check_decay("ITVM", ema)
        self.middle, self.step_size, self.warmup = middle, step_size, warmup
        self.solver, self.solver_steps, self.reuse = "heun", solver_steps, reuse

    def check_data(self, data: Any, student: Any) -> None:
        super().check_data(data, student)
        if self.shares.get("trajectory"):
            check_states(self, data, student)

    def _draw(self, student: FlowMap, batch: Batch, generator: Generators, now: Now) -> tuple[Rows, dict[str, Index]]:
        rows, parts = super()._draw(student, batch, generator, now)
        if (index := parts.get("trajectory")) is None:
            return rows, parts
        some = rows.take("trajectory", index)
        chunks = len(batch) // chunk_rows(len(batch), generator)
        way = given(batch, some, index) or shared(some, self, len(some) // chunks)
        return rows.put(index, on_the_way(*way)), parts

    def goal(self, student: FlowMap, rows: Rows, now: Now) -> Tensor:
        x, s, t, cond = rows.x, rows.s, rows.t, rows.cond
        match rows.part:
            case "interval":
                part = 0.5 + (rows.fraction - 0.5) * self.middle if self.middle else 0.5
                return through_middle(now.target, rows, part)
            case "integral":
                m = s + rows.fraction * (t - s)
                return self.teacher(now.target(x, s, m, **cond), m, **cond)
            case "step":
                # 1 - fraction lies in (0, 1]: no step is zero.
                h = torch.minimum((1 - rows.fraction) * self.step_size, t - s)
                return near_the_end(now.target, self.teacher, rows, t - h)
            case "derivative":
                u, u_dot = self.time_derivative(lambda t: now.target.average_velocity(x, s, t, **cond), t)
                end = x + expand(t - s, x) * u
                ramp = warmed(now.progress, self.warmup)
                return u - normalized(u - self.teacher(end, t, **cond) + ramp * expand(t - s, x) * u_dot)
            case "trajectory":
                return rows.dx
        raise unknown("target of ITVM", rows.part, TARGETS)
