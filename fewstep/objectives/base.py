"""What every objective is, and what several of them share."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fewstep.common.randomness import Generators, chunk_rows, generator, normal
from fewstep.data.batch import Batch, is_prior
from fewstep.data.buckets import of_one_shape
from fewstep.flows.fields import VelocityField, check_field, check_velocity
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Path
from fewstep.flows.products import Product
from fewstep.flows.spaces import Euclid, Space, Tokens
from fewstep.flows.times import DISTRIBUTIONS, NATIVE, read_times, without_native

# Some rows of a batch: those of a slice, or these (n,).
Index = slice | Tensor


@dataclass(frozen=True)
class Loss:
    """``total``: the student's loss, a scalar with grad; without grad where the student stands still in this step.
    ``terms``: named numbers of it, detached scalars, to log.
    ``times``: the (s, t) of the rows each term saw, (n, 2), so that a loss that is not finite can name them.
    ``others``: the loss of every other player that moves in this step, scalars with grad. Each depends on its own
    player's parameters alone, so the gradients of the one sum ``descended`` are those of each loss by itself."""

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    times: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)

    @property
    def descended(self) -> Tensor:
        """The scalar whose gradients train all players."""
        return sum(self.others.values(), self.total)


@dataclass(frozen=True)
class Player:
    """What trains together, by an AdamW of its own.

    Attributes:
        parameters: that train.
        lr: its learning rate, as a factor of the training's.
        betas: of its AdamW; None for those of the training.
        clip: the largest norm of its gradients, None for no limit; ``training``, that of the training.
        floor: a loss that stays below this means that the player has won and teaches nothing more; None where its loss
            has no such bound.
        advice: what to change then.
    """

    parameters: list[nn.Parameter]
    lr: float = 1.0
    betas: tuple[float, float] | None = None
    clip: float | Literal["training"] | None = "training"
    floor: float | None = None
    advice: str = ""

    @classmethod
    def of(cls, group: "list[nn.Parameter] | Player") -> "Player":
        """A plain list of parameters as a player that trains as the training says."""
        return group if isinstance(group, Player) else cls(list(group))


class Objective(nn.Module):
    """A training loss, made with its teacher where it has one: ``ITVM(teacher, ...)``.

    ``ema`` is the decay of the student copy that the loss wants as ``target``, or None where it wants none (the
    trainer then makes none). The teacher stays out of ``state_dict``; parts of the loss that train are parameters of
    it. It knows no device, optimizer or data set, and draws random numbers only from the generators handed in.

    ``sources`` are the arXiv numbers of its papers. ``gamma`` is how the students it makes are sampled when nothing is
    said: 0, or 1 where they only know the way to t = 1 (consistency models), and ``grid`` where they take their steps
    then: uniform, or native where all they learn is at native times; see ``fewstep.sample``. ``trains_field``
    says that what it trains is a velocity field, not a flow map. ``needs_rows``: it learns from real rows, so a recipe
    whose teacher makes the data has none for it. ``uses_data``: it learns from the rows of a batch at all; else these
    only say the shape of a sample, and the conditions. ``around``: it stands around another objective, its ``base``;
    this is the one that a recipe has there where it names none. ``any_space``: all that it does with states are steps
    in the student's space, so that it trains on a torus as in R^n (``fewstep.flows.spaces``). ``ends_alone``: all its
    rows end at t = 1, so that it trains a map that is told no other end (``FlowMap.ends_alone``).
    ``needs_path``: its rows lie between noise and data as the student's path says, and not on trajectories.
    ``needs_whole``: why it cannot train a student whose weights are sharded, and the way out; empty where it can.
    """

    ema: float | None = None
    gamma: float = 0.0
    grid: str = "uniform"
    trains_field: bool = False
    needs_rows: bool = False
    uses_data: bool = True
    around: str | None = None
    any_space: bool = False
    ends_alone: bool = False
    needs_path: bool = True
    needs_whole: str = ""
    sources: tuple[str, ...] = ()

    def __init__(self, teacher: VelocityField | None = None) -> None:
        super().__init__()
        if teacher is not None:
            check_field(teacher, f"the teacher of {type(self).__name__}")
            check_velocity(teacher, type(self).__name__)
        # In a tuple, nn.Module does not see it: the teacher is neither trained nor checkpointed with the objective.
        self._teacher = (teacher.eval().requires_grad_(False),) if teacher is not None else ()

    @property
    def teacher(self) -> VelocityField:
        """The frozen field that is distilled."""
        if not self._teacher:
            raise ValueError(f"{type(self).__name__} was made without a teacher and needs one")
        return self._teacher[0]

    @property
    def has_teacher(self) -> bool:
        return bool(self._teacher)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Objective":
        for teacher in self._teacher:  # but it moves to the student's device with it
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    if TYPE_CHECKING:

        def __call__(
            self,
            student: Any,
            batch: Batch,
            *,
            target: Any = None,
            progress: float = 0.0,
            step: int = 0,
            generator: Generators,
        ) -> Loss: ...

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
        """The loss of one batch.

        Args:
            student: a ``FlowMap``, or a ``VelocityField`` for objectives that train one.
            batch: rows on the student's device.
            target: the slow copy of the student, where ``ema`` is not None.
            progress: how much of the training is done, in [0, 1]; drives annealing.
            step: the number of updates done.
            generator: one, or several that share the rows equally (see ``fewstep.common.randomness``).
        """
        raise NotImplementedError

    def adopt(self, student: nn.Module) -> None:
        """Called once, before the training and before a checkpoint is read: tell the student how it is sampled, and
        make what is shaped like it."""
        if isinstance(student, FlowMap):
            student.gamma, student.grid = self.gamma, self.grid

    def parameter_groups(self, student: nn.Module) -> Mapping[str, list[nn.Parameter] | Player]:
        """Which parameters train, by player; each player gets its own optimizer. The first is the student."""
        own = [p for p in self.parameters() if p.requires_grad]
        return {"student": [p for p in student.parameters() if p.requires_grad] + own}

    def check_student(self, student: Any) -> None:
        """Raise, before anything is spent, if this student cannot be trained by this objective with its teacher."""
        name = type(self).__name__
        if not isinstance(student, FlowMap):
            raise ValueError(f"{name} trains a FlowMap, not a {type(student).__name__}: FlowMap.from_field(field)")
        if student.ends_alone and not self.ends_alone:
            raise ValueError(
                f"{name} trains ends before t = 1 too, and a student with second_time: none is told none: take "
                "ConsistencyDistillation, ConsistencyTraining or SCM, or say second_time: t"
            )
        if self.has_teacher and not student.path.same_as(self.teacher.path):
            raise ValueError(
                f"the student is on {student.path}, the teacher on {self.teacher.path}: use teacher.on(student.path)"
            )

    def check_space(self, student: Any) -> None:
        """Raise if this objective cannot train where the student's samples live."""
        space = student_space(student)
        if space.source is not None and not self.any_space:
            raise ValueError(
                f"{type(self).__name__} is for R^n, and the student's samples live in a {type(space).__name__}: "
                "FlowMatching, and for flow maps ITVM, PSD, SplitMeanFlow and Shortcut, train there"
            )

    def check_data(self, data: Any, student: Any) -> None:
        """Raise, before anything is spent, if this objective cannot train this student on these data."""
        self.check_space(student)
        space = student_space(student)
        if not isinstance(space, Euclid) and not is_prior(data):  # rows may be dear to make
            alike = of_one_shape(data)
            space.check(alike.rows(torch.arange(min(alike.size or 256, 256)), generator(0)).data)
        if self.uses_data and is_prior(data):
            raise ValueError(
                f"{type(self).__name__} learns from data, and data: prior has only a shape and conditions: name a data "
                "set, or take a method that needs none, as LMD and ITVM with starts: prior"
            )
        brings, path = getattr(data, "brings_noise", False), getattr(student, "path", None)
        if path is not None and not path.is_affine and self.uses_data and self.needs_path:
            raise ValueError(
                f"{type(self).__name__} takes rows a_t x1 + s_t x0, and a chain of blocks has states of its ODE alone: "
                "take Trajectory with the chain as its teacher, on stored states (fewstep reflow CHAIN --states 8) or "
                "without, or a method with starts: own, as ITVM has it"
            )
        if path is not None and path.two_sided and not brings and space.source is None:
            raise ValueError(
                f"the student goes from one data set to another ({path}), and the data say nothing of the first: "
                "source: NAME in a recipe, Between(data, source) from Python"
            )
        if path is not None and path.two_sided and not getattr(data, "two_sided", True):
            raise ValueError(
                f"the student goes from one data set to another ({path}), and the pairs start from normal noise: leave "
                "the source out"
            )
        if path is not None and getattr(data, "two_sided", False) and not path.two_sided:
            raise ValueError(
                f"the data come from another data set, and the student is on {path}, which starts from normal noise: "
                "the path between two data sets is Interpolant(), or in a recipe without a teacher source: NAME"
            )


def check_decay(method: str, ema: float) -> float:
    """The decay of a student copy, which lies in [0, 1)."""
    if not 0 <= ema < 1:
        raise ValueError(f"{method}'s ema is {ema}: it lies in [0, 1)")
    return ema


def check_options(method: str, times: str, **in_unit: float) -> None:
    """Raise for a distribution of times that is not known, or an option that does not lie in [0, 1]."""
    read_times(without_native(times)[0], (NATIVE, *DISTRIBUTIONS))
    for name, value in in_unit.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{method}'s {name} is {value}: it lies in [0, 1]")


def student_space(student: Any) -> Space:
    """Where the samples of a student live."""
    return getattr(student, "space", Euclid())


def noise_of(batch: Batch, generator: Generators, space: Space | None = None) -> Tensor:
    """The noise of each row: the batch's own where it is coupled, else drawn from the source of the space."""
    if batch.noise is not None:
        return batch.noise
    source = None if space is None else space.source
    return (
        normal(batch.data, generator) if source is None else source.sample(batch.data.shape, generator).to(batch.data)
    )


def latent_of(path: Path, like: Tensor, generator: Generators) -> Tensor | None:
    """The latent of each row, on a path that has one; nothing is drawn for others."""
    return normal(like, generator) if path.has_latent else None


def split_rows(
    rows: int, shares: dict[str, float], generator: Generators, device: torch.device | str = "cpu"
) -> dict[str, Index]:
    """The rows of a batch shared out to named parts: a slice of them where there is one chunk, else their indices (n,);
    n = 0 for a part with no share. A part without a name is the rest, which may be none.

    Each part takes a run of every chunk (the rows that share a generator). So the split needs no random number, is the
    same on any number of processes, and gives every network call a fixed shape.

    Raises:
        ValueError: if a chunk has so few rows that a part with a share gets none: its term would never be trained.
    """
    return dict(_split(rows, chunk_rows(rows, generator), tuple(shares.items()), torch.device(device)))


@lru_cache(maxsize=64)
def _split(rows: int, chunk: int, shares: tuple[tuple[str, float], ...], device: torch.device) -> dict[str, Index]:
    place = torch.arange(rows) % chunk
    parts: dict[str, Index] = {}
    edge, total = 0.0, sum(share for _, share in shares)
    for name, share in shares:
        first, edge = edge, edge + share / total * chunk
        if name and share > 0 and round(first) == round(edge):
            raise ValueError(
                f"{name!r} has {share / total:.3g} of the rows, which is none in chunks of {chunk}: use larger chunks, "
                f"such as a batch that is a multiple of {max(64, math.ceil(total / share))}, or a larger share"
            )
        run = slice(round(first), round(edge))
        inside = (place >= run.start) & (place < run.stop)
        parts[name] = run if chunk == rows else inside.nonzero().flatten().to(device)
    return parts


def rows_of(cond: dict[str, Tensor], rows: Index) -> dict[str, Tensor]:
    """The conditions of some of the rows."""
    return {name: value[rows] for name, value in cond.items()}


def tokens_of(objective: Any, student: Any) -> Tokens | Product | None:
    """The tokens, or the product with some, that errors are the cross-entropy of; None where errors are squared."""
    space = student_space(student)
    tokens = space if objective.any_space and isinstance(space, Tokens | Product) else None
    tokens = None if isinstance(tokens, Product) and not tokens.tokens else tokens
    if objective.error_in == "tokens" and tokens is None:
        name = type(objective).__name__
        raise ValueError(
            f"{name}'s error_in is tokens: that is for samples of tokens, and methods without a derivative"
        )
    return tokens if objective.error_in in ("auto", "tokens") else None


def squared_error(x: Tensor, y: Tensor) -> Tensor:
    """The mean over components of the squared error, in float32 at least: (B,)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(dtype) - y.to(dtype)).square().flatten(1).mean(1)
