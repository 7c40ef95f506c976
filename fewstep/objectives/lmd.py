"""Lagrangian map distillation: the derivative of the map in its end time against the teacher at its end point."""

from typing import Any

import torch

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
from fewstep.paths import as_times
from fewstep.randomness import Generators
from fewstep.times import draw_pairs, draw_times


class LMD(Objective):
    """``E |d_t X_{s,t}(x_s) - v_t(X_{s,t}(x_s))|^2`` (arXiv 2406.07507, 2505.18825).

    ``d_t X = u + (t - s) d_t u`` by one forward-mode pass in t alone; the loss's gradient goes backward through it,
    which costs 3 to 5 plain steps and as much memory, and rules out fused attention and checkpointing.

    Args:
        teacher: the frozen field.
        through_teacher: let the gradient run through v_t (the first paper) or stop it there (the second, the default:
            better at every step count in the measured tables, and cheaper).
        diagonal: the share of rows on s = t, where the loss is ``|u(x_s, s, s) - v_s(x_s)|^2``.
        times, ends: see :func:`fewstep.times.draw_pairs`.

    Raises:
        ValueError: for an unknown distribution of times, or a share out of its range.
    """

    def __init__(
        self,
        teacher: VelocityField,
        through_teacher: bool = False,
        diagonal: float = 0.25,
        times: str = "uniform",
        ends: float = 0.0,
    ) -> None:
        super().__init__(teacher)
        check_options("LMD", times, diagonal=diagonal, ends=ends)
        if diagonal == 1:
            raise ValueError("LMD's diagonal is 1: that leaves no row for the map itself, take less")
        self.through_teacher, self.diagonal, self.times, self.ends = through_teacher, diagonal, times, ends

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
        parts = split_rows(rows, {"tangent": self.diagonal, "off": 1 - self.diagonal}, generator, noise.device)
        diagonal, off = parts["tangent"], parts["off"]
        s, t = draw_pairs(rows, generator, self.times, self.ends)
        s, t, start = (as_times(time, noise) for time in (s, t, draw_times(rows, generator, self.times)))
        s[diagonal] = t[diagonal] = start[diagonal]
        x, _ = student.path.sample(noise, batch.data, s)

        cond = rows_of(batch.cond, off)
        end, end_dot = time_derivative(lambda t: student(x[off], s[off], t, **cond), t[off])
        with torch.set_grad_enabled(self.through_teacher):
            velocity = self.teacher(end if self.through_teacher else end.detach(), t[off], **cond)
        lagrangian = squared_error(end_dot, velocity).mean()
        terms, times = {"lagrangian": lagrangian}, {"lagrangian": torch.stack([s[off], t[off]], 1)}

        if len(diagonal):
            cond = rows_of(batch.cond, diagonal)
            with torch.no_grad():
                velocity = self.teacher(x[diagonal], s[diagonal], **cond)
            terms["tangent"] = squared_error(student.velocity(x[diagonal], s[diagonal], **cond), velocity).mean()
            times["tangent"] = torch.stack([s[diagonal], s[diagonal]], 1)
        total = torch.stack(list(terms.values())).sum()
        return Loss(total, {name: term.detach() for name, term in terms.items()}, times)
