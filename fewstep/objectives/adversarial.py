"""The adversarial term: a critic that tells the map's own samples from the data, around any objective."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import relu, softplus

from fewstep.common import distributed
from fewstep.common.errors import unknown
from fewstep.common.options import arguments
from fewstep.common.randomness import normal
from fewstep.flows.maps import FlowMap
from fewstep.objectives.base import Objective
from fewstep.objectives.critic_of import (
    check_critic,
    check_logits,
    check_name,
    check_rows,
    conditions_of,
    critic_of,
    example_rows,
    last_weight,
    type_of,
)
from fewstep.objectives.diffused import Diffused
from fewstep.objectives.finishing import Finishing, Judged, Made
from fewstep.objectives.penalties import has_second_derivative, slope, slope_by_difference
from fewstep.objectives.teacher_critic import TeacherCritic

# What the critic and the student descend, given the logits of real and made rows.
Game = tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]
GAMES: dict[str, Game] = {
    "relativistic": (lambda real, made: softplus(made - real), lambda real, made: softplus(real - made)),
    "hinge": (lambda real, made: relu(1 - real) + relu(1 + made), lambda _, made: -made),
    "logistic": (lambda real, made: softplus(-real) + softplus(made), lambda _, made: softplus(-made)),
}
SLOPES = ("auto", "exact", "difference")


class Adversarial(Finishing):
    """``base + weight E f(D(x1) - D(X))``: a critic D tells rows x1 of the data from samples X of the map, which moves
    its samples to where D takes them for real.

    X is X_{0,1}(z), or a sample of more steps, under the conditions of x1. With ``f(r) = softplus(r)``, by ``loss``:

        ``relativistic``: critic ``E f(D(X) - D(x1))``;  student ``E f(D(x1) - D(X))``  (arXiv 2501.05441)
        ``logistic``: critic ``E f(-D(x1)) + E f(D(X))``;  student ``E f(-D(X))``
        ``hinge``: critic ``E relu(1 - D(x1)) + E relu(1 + D(X))``;  student ``-E D(X)``
        all: critic ``+ penalty / 2 (E |grad D(x1)|^2 + E |grad D(X)|^2)``, norms summed over components

    The student's term sees D with its weights held fixed and the critic's sees X held fixed, so both move at once, each
    by its own loss. The base keeps the map on its trajectories. This is the adversarial stage of AYF (arXiv 2506.14603,
    reconstructed from secondary texts) and the term that CTM adds (2310.02279). It needs real rows: samples of a
    teacher do where they are what is wanted.

    Args:
        base: any objective of flow maps, such as ``ITVM(teacher)``.
        critic: ``conv`` for images with sides of 8 or more, ``mlp``; ``auto``, the one that fits; ``teacher``, heads on
            features of the base's teacher (:class:`TeacherCritic`). A mapping ``{"name": "conv", "width": 64}`` has
            options of theirs. Or any module ``critic(x, **cond) -> (n,)``, more for what is real: it gets the
            conditions that its ``forward`` names.
        weight: of the term.
        penalty: of the slopes, 0 for none.
        loss: one of the above.
        slopes: ``exact``, with a second derivative; ``difference``, without (see
            :func:`fewstep.objectives.penalties.slope_by_difference`); ``auto``, exact where the critic has a second
            derivative, and difference for the critic ``teacher``.
        adaptive: multiply the term by ``|grad base| / |grad term|`` of the layer of the student that runs last, clamped
            to [0, 1e4] (arXiv 2012.09841): ``weight`` is then their ratio. ``base``'s weight beside the term in AYF's
            writing is ``1 / weight``.
        diffused: put noise on the critic's rows, see :class:`Diffused`; a mapping has options of it.
        share, rollout, begin, ramp, every, lr: see :class:`Finishing`.

    Raises:
        ValueError: an option out of its range, a critic that does not give a logit a row.
    """

    player = "critic"
    needs_rows = True
    betas = (0.0, 0.99)
    advice = (
        "Put noise on its rows (diffused: true), raise its penalty or lower its lr, and see that the data are those "
        "that the teacher knows"
    )
    sources = ("2506.14603", "2501.05441")

    def __init__(
        self,
        base: Objective,
        critic: str | dict[str, Any] | nn.Module = "auto",
        weight: float = 0.1,
        penalty: float = 0.02,
        loss: str = "relativistic",
        slopes: str = "auto",
        adaptive: bool = False,
        diffused: bool | dict[str, Any] = False,
        share: float = 0.5,
        rollout: Sequence[int] = (1, 2, 4),
        begin: float = 0.5,
        ramp: float = 0.05,
        every: int = 1,
        lr: float = 1.0,
    ) -> None:
        if loss not in GAMES:
            raise unknown("loss of Adversarial", loss, GAMES)
        if slopes not in SLOPES:
            raise unknown("slopes of Adversarial", slopes, SLOPES)
        if penalty < 0:
            raise ValueError(f"Adversarial's penalty is {penalty}: it is not negative")
        super().__init__(
            base, weight=weight, share=share, rollout=rollout, begin=begin, ramp=ramp, every=every, lr=lr
        )  # fmt: skip
        self.penalty, self.loss, self.slopes, self.adaptive = penalty, loss, slopes, adaptive
        if isinstance(diffused, dict):
            diffused = arguments("objective.diffused", Diffused, diffused, given=("critic",))
        self.needs_whole = "adaptive: true asks for the gradient of one weight: say adaptive: false" if adaptive else ""
        self.diffused = diffused
        self.critic: nn.Module | None = None
        self.wanted: str | dict[str, Any] = "auto"
        if isinstance(critic, nn.Module):
            self.critic = self._with_noise(critic)
        else:
            check_name(critic)
            self.wanted = critic
        # Its loss without the penalty is near 0 where it tells all rows apart by a wide margin.
        self.floor = 0.05 if loss == "relativistic" else 0.1
        self._exact = None if slopes == "auto" else slopes == "exact"
        self._last: str | None = None
        self._tried = False

    def check_student(self, student: Any) -> None:
        super().check_student(student)
        self._settle(student)

    def adopt(self, student: nn.Module) -> None:
        super().adopt(student)
        self._settle(student)

    def player_parameters(self) -> list[nn.Parameter]:
        return [] if self.critic is None else [p for p in self.critic.parameters() if p.requires_grad]

    def judged(self, student: FlowMap, made: Made) -> Judged:
        if (critic := self.critic) is None:
            raise ValueError("Adversarial has no critic yet: call adopt(student) first, as fit does")
        critic_loss, student_loss = GAMES[self.loss]
        with _full_precision(critic, made.x):
            real, x = (rows.to(type_of(critic)) for rows in (made.data, made.x))
            told_real, told = self._told(critic, real, made), self._told(critic, x, made)
            if self.loss == "relativistic":  # a pair has the same noise level
                told |= {name: told_real[name] for name in ("level", "time") if name in told_real}
            on_real, steep_real = self._slope(critic, real, told_real, made)
            on_made, steep_made = self._slope(critic, x.detach(), told, made)
            loss = critic_loss(on_real, on_made).mean() + self.penalty / 2 * (steep_real + steep_made).mean()
            terms = {"critic_real": on_real.mean().detach(), "critic_made": on_made.mean().detach()}
            if isinstance(critic, Diffused):
                # Relativistic logits have no zero: what says how sure it is are the pairs.
                critic.see(on_real - on_made if self.loss == "relativistic" else on_real)
                terms["critic_noise"] = critic.p.clone()
            if not made.is_turn:
                return Judged(None, loss, terms)
            held = {name: p.detach() for name, p in critic.named_parameters()}
            term = student_loss(on_real.detach(), functional_call(critic, held, x, told)).mean()
        return Judged(term, loss, {**terms, "adversarial": term.detach()})

    def scale(self, student: FlowMap, base: Tensor, term: Tensor) -> Tensor | float:
        """``|grad base| / |grad term|`` of the last layer, over all processes, where that is wanted; else 1."""
        if not self.adaptive or not base.requires_grad:
            return 1.0
        weight = dict(student.named_parameters())[self._last or last_weight(student)]
        both = torch.stack([torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (base, term)])
        of_base, of_term = distributed.summed(both).flatten(1).norm(dim=1)
        return (of_base / (of_term + 1e-8)).clamp(0, 1e4)

    def _told(self, critic: nn.Module, x: Tensor, made: Made) -> dict[str, Tensor]:
        """What a critic is told beside its rows: their conditions, and its random numbers where it draws any."""
        draws: Any = getattr(critic, "draws", None)
        return conditions_of(critic, made.cond) | ({} if draws is None else draws(x, made.generator, made.step))

    def _slope(self, critic: nn.Module, x: Tensor, told: dict[str, Tensor], made: Made) -> tuple[Tensor, Tensor]:
        """The logits of rows, and the square of their slopes, (n,) each."""

        def logits(x: Tensor) -> Tensor:
            given = critic(x, **told)
            check_logits(critic, given, len(x))
            return given

        if not self.penalty or not torch.is_grad_enabled():
            given = logits(x)
            return given, torch.zeros_like(given)
        if self._exact is None:
            self._exact = not isinstance(critic, TeacherCritic) and has_second_derivative(critic, x, told)
        return slope(logits, x) if self._exact else slope_by_difference(logits, x, normal(x, made.generator))

    def _with_noise(self, critic: nn.Module) -> nn.Module:
        check_critic(critic)
        return (
            Diffused(critic, **(self.diffused if isinstance(self.diffused, dict) else {})) if self.diffused else critic
        )

    def _settle(self, student: Any) -> None:
        """Make the critic, and try it on rows like the student's samples where it is known what they are."""
        if self.critic is None:
            teacher = self.teacher if self.has_teacher else None
            self.critic = self._with_noise(critic_of(self.wanted, student, teacher, level=bool(self.diffused)))
            self._exact = not isinstance(self.critic, TeacherCritic) if self._exact is None else self._exact
            self._tried = isinstance(self.critic, TeacherCritic)  # which has tried itself
        if not self._tried and (example := example_rows(student)) is not None:
            check_rows(self.critic, *example)
        if self.adaptive and self._last is None:
            self._last = last_weight(student)
        self._tried = True


def _full_precision(critic: nn.Module, x: Tensor) -> AbstractContextManager[Any]:
    """A critic computes in the type of its weights whatever the training does, as a slope squared has no room in fp16;
    the teacher as the teacher does elsewhere."""
    return nullcontext() if isinstance(critic, TeacherCritic) else torch.autocast(x.device.type, enabled=False)
