"""Improved MeanFlow: the model's own velocity for a direction, and, from labelled data, guidance of any strength."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.common.randomness import Generators, uniform
from fewstep.data.batch import Batch
from fewstep.data.conditions import blank
from fewstep.flows.broadcasting import expand
from fewstep.flows.fields import VelocityField
from fewstep.flows.guided import Guided
from fewstep.flows.maps import FlowMap
from fewstep.flows.signature import takes
from fewstep.objectives.base import Index, check_options, squared_error
from fewstep.objectives.mean_flow import BaseMeanFlow
from fewstep.objectives.rows import Now, Rows
from fewstep.objectives.velocity_head import VelocityHead, check_place


class ImprovedMeanFlow(BaseMeanFlow):
    """``E |u(x_s, s, t) - (t - s) sg[Du] - v_s|^2`` with Du along the model's own ``u(x_s, s, s)`` (arXiv 2512.02012):
    one more call than :class:`MeanFlow`, and no noise of the conditional velocity in the derivative.

    ``guided``, from labelled data and with no guided teacher: each row draws a strength w and an interval of times, of
    which the student is told, and in that interval the velocity is

        ``v_s = dx_s + (1 - 1/w) (v - v_null)``, outside it ``dx_s``

    with the model's own velocity v at (w, interval), and v_null the same without labels. What solves it is ``v_null + w
    (v_s(x|label) - v_null)``: guidance of strength w. Rows without a label have v = v_null, so that they learn the
    plain velocity.

    ``head``: v comes from a second output of the network, trained with the same goal, in the call that gives u: a
    direction costs no call of its own. Beside it, guidance costs one call.

    Args:
        teacher: the frozen field, or None to train from data.
        diagonal, times, ends, adaptive, options: see :class:`TwoTime`. The paper has ``adaptive=1``.
        guided: learn guidance.
        null: the conditions that stand for none, such as ``{"class_labels": 10}``.
        strengths: of guidance, drawn with a density of 1 / w between these.
        drop: the share of the rows that lose their conditions for those of ``null``.
        scale: the strength that samples have if nothing is said.
        head: by default where it is ``guided``.

    Raises:
        ValueError: an option out of its range, guidance without null conditions or of a teacher that is guided already;
            of a student that is told no strength of guidance, or has no place for a head.
    """

    sources = ("2512.02012", "2505.13447")
    beside: Mapping[str, float] = {"head": 1.0}
    of_all_rows = ("head",)

    def __init__(
        self,
        teacher: VelocityField | None = None,
        diagonal: float = 0.5,
        times: str = "uniform",
        ends: float = 0.0,
        adaptive: float = 0.0,
        error_in: str = "auto",
        jvp: str = "forward",
        guided: bool = False,
        null: dict[str, Any] | None = None,
        strengths: tuple[float, float] = (1.0, 8.0),
        drop: float = 0.1,
        scale: float = 2.0,
        head: bool | None = None,
    ) -> None:
        super().__init__(
            teacher, diagonal=diagonal, times=times, ends=ends, adaptive=adaptive, error_in=error_in, jvp=jvp
        )
        check_options("ImprovedMeanFlow", times, drop=drop)
        if guided != bool(null):
            raise ValueError(
                "ImprovedMeanFlow learns guidance from conditions that stand for none: say both guided: true and null, "
                "such as {class_labels: 10}, or neither"
            )
        if guided and drop == 0:
            raise ValueError("ImprovedMeanFlow's drop is 0: without rows that lose their labels there is no guidance")
        if not 0 < strengths[0] <= strengths[1]:
            raise ValueError(f"ImprovedMeanFlow's strengths run from {strengths[0]} to {strengths[1]}: 0 < low <= high")
        if guided and not strengths[0] <= scale <= strengths[1]:
            raise ValueError(
                f"ImprovedMeanFlow's scale is {scale}, outside the strengths that it learns, {list(strengths)}"
            )
        if guided and isinstance(teacher, Guided):
            raise ValueError("ImprovedMeanFlow is guided, and so is its teacher: leave one of them out")
        self.guided, self.null, self.strengths, self.drop, self.scale = guided, null or {}, strengths, drop, scale
        self.wants_head, self.head = guided if head is None else head, None

    def check_student(self, student: Any) -> None:
        super().check_student(student)
        if self.guided and not takes(student, "guidance"):
            raise ValueError(
                "ImprovedMeanFlow tells the student the strength of guidance, and its "
                f"{type(student.network).__name__} takes none: FlowMap.from_field(field, guidance='interval')"
            )
        if self.wants_head:
            check_place(student)

    def adopt(self, student: nn.Module) -> None:
        super().adopt(student)
        if isinstance(student, FlowMap):
            student.guidance = self.scale if self.guided else student.guidance
            self.head = VelocityHead(student) if self.wants_head else None

    def goal(self, student: FlowMap, rows: Rows, now: Now) -> Tensor:
        own = student.velocity(rows.x, rows.s, **rows.cond)
        return self.mean_goal(student, rows, self.velocity(rows), own)

    def velocity(self, rows: Rows) -> Tensor:
        told = {"guidance"} if self.guided else set()  # which the teacher is not
        cond = {name: value for name, value in rows.cond.items() if name not in told}
        return super().velocity(replace(rows, cond=cond))

    def errors(self, student: FlowMap, rows: Rows, parts: dict[str, Index], now: Now) -> dict[str, Tensor]:
        if not (self.wants_head or self.guided):
            return super().errors(student, rows, parts, now)
        u, v = self._both(student, rows, rows.cond)
        with torch.no_grad():
            own = self._own(student, rows, rows.cond) if v is None else v.detach()
            velocity = self.guided_velocity(student, rows, own) if self.guided else self.velocity(rows)
            goal = velocity.to(torch.promote_types(rows.x.dtype, torch.float32)).clone()
            index = parts[self.term]
            goal[index] = self.mean_goal(student, rows.take(self.term, index), goal[index], own[index])
        error = squared_error(u, goal)
        errors = {name: self._in_unit(error[some], student, rows.take(name, some)) for name, some in parts.items()}
        if v is not None:
            errors["head"] = self._in_unit(squared_error(v, velocity), student, rows)
        return errors

    def guided_velocity(self, student: FlowMap, rows: Rows, own: Tensor) -> Tensor:
        """``v_s + (1 - 1/w) (own - v_null)`` inside the interval of each row, v_s outside."""
        without = {name: blank(name, value, rows.cond[name]) for name, value in self.null.items()}
        none = self._own(student, rows, {**rows.cond, **without})
        told = rows.cond["guidance"]
        strength, low, high = told.unbind(1) if told.ndim == 2 else (told, 0 * told, 0 * told + 1)
        share = torch.where((low <= rows.s) & (rows.s <= high), 1 - 1 / strength, 0.0)
        return self.velocity(rows) + expand(share, rows.x) * (own - none)

    def _both(self, student: FlowMap, rows: Rows, cond: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """u, and v where there is a head for it."""
        if not self.wants_head:
            return student.average_velocity(rows.x, rows.s, rows.t, **cond), None
        if self.head is None:  # in a loop of one's own
            raise ValueError("this objective has a velocity head: call objective.adopt(student) before the first step")
        return self.head(student, rows.x, rows.s, rows.t, cond)

    def _own(self, student: FlowMap, rows: Rows, cond: dict[str, Tensor]) -> Tensor:
        """The model's own velocity at x_s."""
        if not self.wants_head:
            return student.velocity(rows.x, rows.s, **cond)
        _, v = self._both(student, rows, cond)
        assert v is not None
        return v

    def _draw(self, student: FlowMap, batch: Batch, generator: Generators, now: Now) -> tuple[Rows, dict[str, Index]]:
        rows, parts = super()._draw(student, batch, generator, now)
        if not self.guided:
            return rows, parts
        if missing := sorted(set(self.null) - set(rows.cond)):
            has = ", ".join(rows.cond) or "none"
            raise ValueError(f"ImprovedMeanFlow's null names {missing[0]!r}, a condition that the data has not: {has}")
        if "guidance" in rows.cond:
            raise ValueError(
                "ImprovedMeanFlow draws the strength of guidance, and the data has one: leave it out there"
            )
        place, first, last, dropped = (uniform(len(batch), generator).to(rows.s) for _ in range(4))
        low, high = self.strengths
        strength = low * (high / low) ** place
        is_told_interval = getattr(student.network, "takes_interval", False)
        told = torch.stack([strength, first / 2, (1 + last) / 2], dim=1) if is_told_interval else strength
        out = dropped < self.drop
        without = {
            name: torch.where(expand(out, rows.cond[name]).bool(), blank(name, value, rows.cond[name]), rows.cond[name])
            for name, value in self.null.items()
        }
        return replace(rows, cond={**rows.cond, **without, "guidance": told}), parts
