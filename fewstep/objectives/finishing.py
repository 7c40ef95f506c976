"""What stands around another objective: a term on the samples that a map makes by itself, and the player it needs.

Objectives of flow maps compare with trajectories, row by row, and stop short at one call. What compares *distributions*
finishes them: the base keeps the map on its trajectories, the term moves where its samples land.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.common.randomness import Generators, normal
from fewstep.data.batch import Batch
from fewstep.flows.fields import VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import grid_times, sample_map
from fewstep.flows.times import draw_times
from fewstep.objectives.base import Loss, Objective, Player, rows_of, split_rows
from fewstep.objectives.weights import warmed


@dataclass(frozen=True)
class Made:
    """Samples that the student has made, and what is drawn beside them.

    Attributes:
        x: the samples (n, ...), with grad where the student moves in this step.
        noise, data: their starts, and as many rows of the data under the same conditions, (n, ...) each.
        cond: the conditions.
        generator: one, or several that share these rows equally, as they do the batch's.
        progress, step: where the training is.
    """

    x: Tensor
    noise: Tensor
    data: Tensor
    cond: dict[str, Tensor]
    generator: Generators
    progress: float = 0.0
    step: int = 0

    @property
    def is_turn(self) -> bool:
        """Whether the student moves in this step."""
        return self.x.requires_grad

    def normal(self) -> Tensor:
        """Fresh standard normal numbers (n, ...)."""
        return normal(self.noise, self.generator)

    def times(self, distribution: str = "uniform") -> Tensor:
        """Fresh times (n,), see :func:`fewstep.flows.times.draw_times`; native ones are moved by the objective."""
        return draw_times(len(self.x), self.generator, distribution).to(self.x)


@dataclass(frozen=True)
class Judged:
    """What a finishing objective says of samples: the ``student``'s term, a scalar, or None where it stands still; the
    ``player``'s loss, which is the student's too where the student's network plays that part; ``terms`` to log."""

    student: Tensor | None
    player: Tensor | None
    terms: dict[str, Tensor] = field(default_factory=dict)


def rollout(student: FlowMap, noise: Tensor, steps: int, generator: Generators, **cond: Tensor) -> Tensor:
    """Samples (n, ...) in ``steps`` steps, as ``fewstep.sample`` makes them, with grad through the last alone."""
    times = grid_times(student, steps, shape=tuple(noise.shape[1:]))
    times = times.to(noise.device, torch.promote_types(noise.dtype, torch.float32))
    x = noise
    if steps > 1:
        x = sample_map(student, noise, times[:-1], gamma=student.gamma, generator=generator, **cond)
    return student(x, times[-2], times[-1], **cond)


class Finishing(Objective):
    """The base of objectives around another: ``total = base + weight * term(samples)``, and a second player's loss.

    The base's rows, copies, checks and players are its own, and are forwarded here once. Subclasses say what they think
    of samples (``judged``) and make their player (``adopt``).

    Args:
        base: any objective that trains a flow map.
        weight: of the term beside the base's loss.
        share: of the rows of a batch, on which samples are made.
        rollout: the numbers of steps of the samples, in turn by steps of the training; the gradient runs through the
            last step of each.
        begin: the share of the training after which the term begins: until then the base trains alone.
        ramp: over this share of the training the weight rises from 0.
        every: the student, its base too, moves in each so many steps alone, the other player in all.
        lr: the player's learning rate, as a factor of the training's.

    Raises:
        ValueError: an option out of its range, a base of fields, or one with a player of the same name.
    """

    player = "player"
    around = "ITVM"
    # What a recipe tells ITVM inside where it says nothing else: docs/methods/corrected.md has the figures.
    inside: Mapping[str, Any] = MappingProxyType({"ema": 0.9, "times": "uniform", "ends": 0.25})
    betas: tuple[float, float] | None = None
    floor: float | None = None
    advice: str = ""

    def __init__(
        self,
        base: Objective,
        *,
        weight: float,
        share: float,
        rollout: Sequence[int],
        begin: float,
        ramp: float,
        every: int,
        lr: float,
        teacher: VelocityField | None = None,
    ) -> None:
        super().__init__(teacher)
        name = type(self).__name__
        if not isinstance(base, Objective):
            raise ValueError(f"{name} stands around an objective, such as ITVM(teacher), not a {type(base).__name__}")
        if base.trains_field:
            raise ValueError(f"{name} finishes a flow map, and {type(base).__name__} trains a field: take ITVM")
        if isinstance(base, Finishing) and self.player in base.own_players:
            raise ValueError(f"{name} around {type(base).__name__}: both have a player {self.player!r}: leave one out")
        for what, value in {"weight": weight, "lr": lr}.items():
            if not value > 0:
                raise ValueError(f"{name}'s {what} is {value}: it is more than 0")
        for what, value in {"begin": begin, "ramp": ramp}.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name}'s {what} is {value}: it lies in [0, 1)")
        if not 0 < share <= 1:
            raise ValueError(f"{name}'s share is {share}: it lies in (0, 1]")
        if not rollout or min(rollout) < 1:
            raise ValueError(f"{name}'s rollout is {list(rollout)}: one number of steps or more, each at least 1")
        if every < 1:
            raise ValueError(f"{name}'s every is {every}: at least 1")
        self.base, self.weight, self.share, self.rollout = base, weight, share, tuple(rollout)
        self.begin, self.ramp, self.every, self.lr = begin, ramp, every, lr
        self.sources = tuple(dict.fromkeys((*type(self).sources, *base.sources)))

    # What a subclass defines

    def judged(self, student: FlowMap, made: Made) -> Judged:
        """What it thinks of the samples ``made``."""
        raise NotImplementedError

    def player_parameters(self) -> list[nn.Parameter]:
        """What its player trains; nothing where it has none."""
        raise NotImplementedError

    def scale(self, student: FlowMap, base: Tensor, term: Tensor) -> Tensor | float:
        """A factor of the term, without grad, where its weight goes by the base's loss."""
        return 1.0

    # What is the base's

    @property
    def ema(self) -> float | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base.ema

    @property
    def gamma(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base.gamma

    @property
    def ends_alone(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base.ends_alone

    @property
    def grid(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base.grid

    @property
    def teacher(self) -> VelocityField:
        """Its own, or the base's."""
        return self._teacher[0] if self._teacher else self.base.teacher

    @property
    def has_teacher(self) -> bool:
        return bool(self._teacher) or self.base.has_teacher

    @property
    def own_players(self) -> tuple[str, ...]:
        """The names of the players beside the student, from the outside in."""
        return (self.player, *(self.base.own_players if isinstance(self.base, Finishing) else ()))

    def adopt(self, student: nn.Module) -> None:
        self.base.adopt(student)

    def check_student(self, student: Any) -> None:
        super().check_student(student)
        self.base.check_student(student)

    def check_data(self, data: Any, student: Any) -> None:
        super().check_data(data, student)
        self.base.check_data(data, student)

    def parameter_groups(self, student: nn.Module) -> Mapping[str, list[nn.Parameter] | Player]:
        own = self.player_parameters()
        player = {self.player: Player(own, self.lr, self.betas, None, self.floor, self.advice)} if own else {}
        return {**self.base.parameter_groups(student), **player}

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
        begun = progress >= self.begin
        is_turn = not begun or step % self.every == 0
        loss = Loss(torch.zeros((), device=batch.data.device))
        if is_turn:
            loss = self.base(student, batch, target=target, progress=progress, step=step, generator=generator)
        if not begun:
            return loss
        judged = self.judged(student, self._make(student, batch, is_turn, progress, step, generator))
        total = loss.total
        if judged.student is not None:
            weight = self.weight * warmed(progress - self.begin, self.ramp)
            total = total + weight * self.scale(student, loss.total, judged.student) * judged.student
        terms, others = {**loss.terms, **judged.terms}, loss.others
        if judged.player is not None and self.player_parameters():
            others = {**others, self.player: judged.player}
        elif judged.player is not None:  # the student's own network plays the other part too
            total, terms = total + judged.player, {**terms, self.player: judged.player.detach()}
        return Loss(total, terms, loss.times, others)

    def _make(
        self, student: FlowMap, batch: Batch, is_turn: bool, progress: float, step: int, generator: Generators
    ) -> Made:
        """Samples of some of the rows."""
        # The same run of each chunk, so that the generators of the chunks share these rows equally too.
        mine = f"{type(self).__name__}'s share"
        shares = {mine: self.share, "": 1 - self.share}
        rows = split_rows(len(batch), shares, generator, batch.data.device)[mine]
        data, cond = batch.data[rows], rows_of(batch.cond, rows)
        noise = normal(data, generator) if batch.noise is None else batch.noise[rows]
        steps = self.rollout[step // self.every % len(self.rollout)]
        with torch.set_grad_enabled(is_turn and torch.is_grad_enabled()):
            x = rollout(student, noise, steps, generator, **cond)
        return Made(x, noise, data, cond, generator, progress, step)


def name_of(objective: Objective) -> str:
    """The class of an objective, and in brackets that of what it stands around: ``Corrected(ITVM)``."""
    base = getattr(objective, "base", None)
    inside = f"({name_of(base)})" if isinstance(base, Objective) else ""
    return type(objective).__name__ + inside
