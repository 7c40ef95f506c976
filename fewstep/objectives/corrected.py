"""The corrector: reverse KL from the map's own samples to the teacher's, around any objective."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.common.errors import unknown
from fewstep.flows.broadcasting import expand
from fewstep.flows.fields import VelocityField, check_velocity
from fewstep.flows.guided import Guided
from fewstep.flows.maps import FlowMap
from fewstep.objectives.base import Objective, check_options, squared_error
from fewstep.objectives.finishing import Finishing, Judged, Made
from fewstep.objectives.native import check_native, moved_natively

FAKES, REALS = ("copy", "same"), ("teacher", "diagonal")
_FLOOR = 0.05
_EDGE = 0.02  # times at which samples are compared keep away from both ends


class Corrected(Finishing):
    """``base + weight E <X, sg[D]>``: moves samples X of the map along the gradient of KL(map's || teacher's).

    A sample X = X_{0,1}(z), or one of more steps, is noised anew, ``y = a_r X + s_r e``. There the teacher says which
    data it expects, and a second velocity, trained on the map's own samples alone, what the map's samples are like:

        ``D = (x_fake(y, r) - x_teacher(y, r)) / mean |X - x_teacher(y, r)|``
        student: ``1/2 |X - sg[X - D]|^2``;  fake: ``|g(y, r) - d/dr y|^2``, X detached

    D is the difference of both scores, up to a positive factor: zero where both distributions agree, so it has no say
    in *which* noise becomes which sample; the base has. This is the term of distribution matching distillation (arXiv
    2311.18828, 2405.14867), of FreeFlow's corrector (2511.19428) and of rCM (2510.08431), on any path and around any
    objective of flow maps. Reverse KL drops modes: keep the base's loss beside it. It needs no data.

    Args:
        base: any objective of flow maps, such as ``ITVM(teacher)``.
        fake: ``copy``, a copy of the student as the term begins, used on its diagonal as a velocity: of a student
            that trains an adapter (``fewstep.add_lora``), the adapter alone is copied, so that student, fake and
            teacher are three on one base. ``same``: the student's own network, at the pairs of times (r, 0), which no
            map from s to t > s uses (the idea of arXiv 2512.05150): no second network. Or a module ``fake(x, t,
            **cond)`` of one's own, such as a field with an adapter.
        real: ``teacher``, or ``diagonal``: the student's own velocity u(y, r, r), which the base teaches. It errs as a
            fake of the same network errs: better where the teacher is no network, or steep; and it needs no teacher.
        weight: of the term.
        share: of the rows of a batch, on which samples are made.
        rollout: numbers of steps of these samples, in turn; the gradient runs through the last step.
        begin, ramp: the share of the training after which the term begins, and over which it then rises.
        every: the student moves in each so many steps alone, the fake in all.
        lr: the fake's learning rate, as a factor of the training's.
        times: of r, see :func:`fewstep.flows.times.draw_times`; they keep 0.02 away from the ends. ``native`` before a
            distribution moves them as the scheduler of the student's model does.
        normalize: divide by ``mean |X - x_teacher|``, row by row, as distribution matching distillation does (plus a
            twentieth of the deviation that a unit normal would have there, for samples of few numbers).
        guidance_scale, interval: guidance of the teacher in the term alone, for a teacher that is guided; None, as the
            teacher has them.
        teacher: of the term, where the base has none.

    Raises:
        ValueError: an option out of its range, no teacher, guidance of a teacher that has none.
    """

    player = "fake"
    copied: Tensor
    uses_data = False
    sources = ("2311.18828", "2405.14867", "2511.19428", "2510.08431")

    def __init__(
        self,
        base: Objective,
        fake: str | nn.Module = "copy",
        real: str = "teacher",
        weight: float = 1.0,
        share: float = 0.5,
        rollout: Sequence[int] = (1, 2, 4),
        begin: float = 0.5,
        ramp: float = 0.05,
        every: int = 1,
        lr: float = 1.0,
        times: str = "uniform",
        normalize: bool = True,
        guidance_scale: float | None = None,
        interval: tuple[float, float] | None = None,
        teacher: VelocityField | None = None,
    ) -> None:
        if isinstance(fake, str) and fake not in FAKES:
            raise unknown("fake of Corrected", fake, (*FAKES, "lora(RANK), with a teacher that has a network"))
        if real not in REALS:
            raise unknown("real of Corrected", real, REALS)
        check_options("Corrected", times)
        super().__init__(
            base, weight=weight, share=share, rollout=rollout, begin=begin, ramp=ramp, every=every, lr=lr,
            teacher=teacher,
        )  # fmt: skip
        self.real = real
        if real == "teacher" and not self.has_teacher:
            raise ValueError(
                f"Corrected compares with a teacher, and {type(base).__name__} was made without one: "
                "Corrected(base, teacher=field), or real='diagonal'"
            )
        if real == "diagonal" and (guidance_scale, interval) != (None, None):
            raise ValueError("Corrected's guidance_scale and interval are of a teacher, and real is 'diagonal'")
        if self.has_teacher:
            check_velocity(self.teacher, "Corrected")
        self.times, self.normalize, self.kind = times, normalize, fake if isinstance(fake, str) else "given"
        self.guidance_scale, self.interval = guidance_scale, interval
        # In a tuple, nn.Module does not see it: these are the teacher's own weights.
        self._judge = (_guided(self.teacher, guidance_scale, interval),) if real == "teacher" else ()
        self.fake: nn.Module | None = fake if isinstance(fake, nn.Module) else None
        self.register_buffer("copied", torch.zeros((), dtype=torch.bool))
        self._is_copied = False  # the same, without a wait for a GPU

    def adopt(self, student: nn.Module) -> None:
        super().adopt(student)
        if self.kind == "copy":
            frozen = {id(p): p for p in student.parameters() if not p.requires_grad}
            self.fake = deepcopy(student, {**frozen})

    def check_student(self, student: Any) -> None:
        super().check_student(student)
        check_native(self.times, student)
        if student.ends_alone and (self.kind == "same" or self.real == "diagonal"):
            said = "fake: same" if self.kind == "same" else "real: diagonal"
            raise ValueError(
                f"Corrected with {said} asks the student for other ends than t = 1, and with second_time: none it is "
                "told none: say fake: copy and real: teacher"
            )
        student.path.check_noise("Corrected", "Adversarial finishes maps between data sets")

    def player_parameters(self) -> list[nn.Parameter]:
        return [] if self.fake is None else [p for p in self.fake.parameters() if p.requires_grad]

    def fake_velocity(self, student: FlowMap, y: Tensor, r: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """The velocity (n, ...) of the map's own samples, noised to r."""
        if self.kind == "same":
            return student.average_velocity(y, r, torch.zeros_like(r), **cond)
        fake: Any = self.fake
        if fake is None:
            raise ValueError("Corrected has no fake velocity yet: call adopt(student) first, as fit does")
        return fake.velocity(y, r, **cond) if hasattr(fake, "velocity") else fake(y, r, **cond)

    def real_velocity(self, student: FlowMap, y: Tensor, r: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """The velocity (n, ...) that the samples are to have."""
        return self._judge[0](y, r, **cond) if self._judge else student.velocity(y, r, **cond)

    @torch.no_grad()
    def _begin(self, student: FlowMap) -> None:
        """The fake is the student as it is now: what was copied at the start of the training knew nothing yet."""
        if self._is_copied or self.kind != "copy" or self.fake is None:
            return
        self._is_copied = True
        if not self.copied:
            for mine, its in zip(self.fake.parameters(), student.parameters(), strict=True):
                if mine is not its:
                    mine.copy_(its)
            self.copied.fill_(True)

    def judged(self, student: FlowMap, made: Made) -> Judged:
        if torch.is_grad_enabled():
            self._begin(student)
        path, x, cond = student.path, made.x, made.cond
        r = _EDGE + (1 - 2 * _EDGE) * moved_natively(self.times, student, made.times(self.times), x)
        y, dy = path.sample(made.normal(), x.detach(), r)
        fake = self.fake_velocity(student, y, r, cond)
        error = squared_error(fake, dy).mean()
        if not made.is_turn:
            return Judged(None, error)
        with torch.no_grad():
            expected = path.from_velocity(self.real_velocity(student, y, r, cond), y, r, "data")
            d = path.from_velocity(fake.detach(), y, r, "data") - expected
            if self.normalize:
                a, s = path.alpha(r), path.sigma(r)
                # Samples of few numbers may lie on x_teacher by chance: what is left of a unit normal is the floor.
                size = (x - expected).abs().flatten(1).mean(1) + _FLOOR * s / torch.hypot(a, s)
                d = d / expand(size, d)
            goal = x - d
        term = 0.5 * squared_error(x, goal).mean()
        return Judged(term, error, {"corrector": term.detach()})


def _guided(teacher: VelocityField, scale: float | None, interval: tuple[float, float] | None) -> VelocityField:
    """The teacher with other guidance.

    Raises:
        ValueError: it has none.
    """
    if scale is None and interval is None:
        return teacher
    if not isinstance(teacher, Guided):
        raise ValueError("Corrected's guidance_scale and interval are of a guided teacher, and this one is not guided")
    other = teacher.scale_2 if scale is None else None
    scale, interval = teacher.scale if scale is None else scale, interval or teacher.interval
    return Guided(teacher.field, scale, interval, null=teacher.null, weak=teacher.weak, scale_2=other)
