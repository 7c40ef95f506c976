"""Samples of a teacher in the place of data."""

import copy
import sys
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fewstep.common.console import progress_bar
from fewstep.common.distributed import environment
from fewstep.common.randomness import generator
from fewstep.data.arrays import ArrayData
from fewstep.data.batch import Batch
from fewstep.data.numpy_files import open_archive, read_member
from fewstep.data.pairs import FACTS, Pairs, read_facts
from fewstep.flows.fields import VelocityField
from fewstep.flows.signature import classes_of, device_of, shape_of
from fewstep.generation.drawing import draw
from fewstep.generation.images import write
from fewstep.generation.reflow import facts_of, make_pairs, settings_of
from fewstep.generation.requests import read_lines
from fewstep.training.fingerprint import differences

_FEW, _SHARD = 8, 1000


class TeacherSamples:
    """Samples of the teacher in the place of data, drawn when they are first needed and kept in a file.

    Args:
        field: the teacher. shape: one sample's; by default what the teacher's network or data has.
        count: how many. steps, solver: see ``fewstep.sample``. classes: draw ``class_labels`` below this; by default
            the classes of the teacher's network. seed: decides them. file: an ``.npz`` to keep them in.
    """

    def __init__(
        self,
        field: VelocityField,
        count: int = 50_000,
        steps: int = 50,
        solver: str = "heun",
        shape: Sequence[int] | None = None,
        classes: int | None = None,
        seed: int = 0,
        file: Path | None = None,
    ) -> None:
        self.field, self.steps, self.solver, self.seed, self.file = field, steps, solver, seed, file
        self.shape = shape_of(field) if shape is None else tuple(shape)
        self.size: int | None = count
        classes = classes_of(field) if classes is None else classes
        draw = generator(seed, 1)
        self.cond = {"class_labels": torch.randint(classes, (count,), generator=draw)} if classes else {}

    def rows(self, index: Tensor, generator: torch.Generator) -> Batch:
        return self._array.rows(index, generator)

    @cached_property
    def _array(self) -> ArrayData:
        if self.file is not None and self.file.exists():
            return self._kept(self.file)
        labels = self.cond["class_labels"].tolist() if self.cond else None
        print(f"drawing {self.size} samples of the teacher, once", file=sys.stderr, flush=True)
        samples, cond, _ = draw(
            self.field, self.size or 0, self.steps, shape=self.shape, seed=self.seed, labels=labels, solver=self.solver
        )
        if self.file is not None:
            write(samples, cond, self.file)
        return ArrayData(samples, cond)

    def _kept(self, file: Path) -> ArrayData:
        """The samples that were drawn before.

        Raises:
            ValueError: the file is damaged, or holds others than these.
        """
        try:
            with open_archive(file) as archive:
                kept = {name: read_member(archive, name, file) for name in ("data", *self.cond)}
            data = ArrayData(kept.pop("data"), kept, name=f"data in {file}")
            if (data.size, data.shape) != (self.size, self.shape):
                raise ValueError(f"{file} has {data.size} samples of {data.shape}, not {self.size} of {self.shape}")
        except ValueError as error:
            raise ValueError(f"{error}. Remove {file.name}, and the samples are drawn anew") from None
        return data


class TeacherPairs:
    """Samples of a teacher that are kept in shards, memory-mapped: those of a text teacher, of prompts that they take
    in turn, and those that bring their noise and ``states`` of their trajectory along. They are drawn when they are
    first needed, by all processes together. A run that was stopped goes on drawing.

    Args:
        field: the teacher, guided if it is to be. prompts: texts, or a file of them: a line each, or a ``.jsonl`` with
            ``text`` on each line.
        count: how many. steps, solver, states: see :func:`fewstep.make_pairs`. shape: one sample's; by default that of
            the teacher. classes: the labels, in turn, are those below this; by default the classes of the teacher.
        batch: samples drawn at once; by default 64 of a text teacher, and 1,000 of another. seed: decides them.
        folder: where they are kept, by default until the end.
        guidance: the strength that the teacher is told, where it takes one.
        fresh: the samples in the folder are about to be thrown away, and are not looked at.

    Attributes:
        cond: all class labels; of a text teacher the conditions of the first eight rows: those of all would fill the
            memory.
        brings_noise, two_sided, path, states: as :class:`fewstep.data.Pairs` has them; without states a row is a
            sample alone.

    Raises:
        FileNotFoundError: no such file of prompts. ValueError: no prompts, settings that cannot be, or a folder of
            other samples; says what differs.
    """

    def __init__(
        self,
        field: VelocityField,
        prompts: str | list[str] | None = None,
        count: int = 50_000,
        steps: int = 50,
        solver: str = "heun",
        shape: Sequence[int] | None = None,
        classes: int | None = None,
        batch: int | None = None,
        seed: int = 0,
        folder: Path | None = None,
        guidance: float | None = None,
        states: int | list[float] = 0,
        fresh: bool = False,
    ) -> None:
        self.prompts = read_lines(prompts).prompts if isinstance(prompts, str) else prompts
        if field.text is not None and not self.prompts:
            raise ValueError(f"data.prompts: {prompts!r} has no prompts")
        if field.text is None and self.prompts:
            raise ValueError(
                "data.prompts: the teacher has no text encoders that fewstep knows, so it takes no prompts"
            )
        if count < 1:
            raise ValueError(f"data.count is {count}: at least one sample is drawn")
        of_text = field.text is not None
        self.field, self.labels = field, range(classes_of(field) if classes is None else classes)
        self.shape = shape_of(field) if shape is None else tuple(shape)
        self.size: int | None = count
        self._count, self._batch = count, batch or (64 if of_text else 1000)
        if folder is None:
            self._aside = tempfile.TemporaryDirectory()
            folder = Path(self._aside.name) / "pairs"
        self.folder = folder
        self._settings = {
            "steps": steps, "solver": solver, "seed": seed, "guidance": guidance, "states": states,
            "shard": _SHARD if of_text else 10 * _SHARD,
        }  # fmt: skip
        self._known = settings_of(field, count, **self._settings)
        self.states: int = self._known["states"] or 0
        self.path: list[float] | None = self._known["path"]
        self.brings_noise, self.two_sided = self.states > 0, self.states > 0 and field.path.two_sided
        self._fresh = fresh
        if not fresh:
            self._refuse_others()

    @cached_property
    def cond(self) -> dict[str, Tensor]:
        if not self.prompts:
            turns = torch.arange(self._count) % max(len(self.labels), 1)
            return {"class_labels": turns} if self.labels else {}
        assert self.field.text is not None
        few = [self.prompts[i % len(self.prompts)] for i in range(min(_FEW, self._count))]
        if (drawn := self._drawn) is not None:
            return drawn.rows(torch.arange(len(few)), generator(0)).cond
        latents = self.field.latents
        height, width = (self.shape if latents is None else latents.image_shape_of(self.shape))[-2:]
        # A copy, so that the encoders are let go again.
        return copy.copy(self.field.text).encode(few, size=(height, width))

    def rows(self, index: Tensor, generator: torch.Generator) -> Batch:
        paired = self._pairs.rows(index, generator)
        return paired if self.states else Batch(paired.data, paired.cond)

    def bare(self, index: Tensor) -> Tensor:
        """The samples of ``index`` (n,) alone."""
        return self._pairs.bare(index)

    def captions(self, index: Tensor) -> list[str]:
        """The prompts of ``index`` (n,), to be shown; empty where there are none."""
        return [self.prompts[i % len(self.prompts)] for i in index.tolist()] if self.prompts else []

    def _refuse_others(self) -> None:
        if not (self.folder / FACTS).is_file():
            return
        facts = facts_of(self.field, self.shape, self.labels, self.prompts, **self._known)
        # Once all are drawn, the text encoders may be gone.
        unknown = {"command"} | ({"text"} if facts.get("text") is None else set())
        if differing := differences(read_facts(self.folder), facts, unknown):
            raise ValueError(
                f"{self.folder} holds other samples of a teacher: {'; '.join(differing)}. Use another output folder "
                "(--out), or resume=False (--fresh) to throw these away and draw anew"
            )

    @property
    def _drawn(self) -> Pairs | None:
        """The samples, where all are drawn."""
        try:
            return None if self._fresh else Pairs(self.folder)
        except (FileNotFoundError, ValueError):
            return None

    @cached_property
    def _pairs(self) -> Pairs:
        if (drawn := self._drawn) is not None:
            return drawn
        device = device_of(self.field)
        what = "trajectories" if self.states else "samples"
        with progress_bar(f"drawing {self._count} {what} of the teacher, once", not environment().is_main) as progress:
            make_pairs(
                self.field, self.folder, self._count, shape=self.shape, labels=self.labels, prompts=self.prompts,
                batch=self._batch, device=device, command="the training that drew it", progress=progress, rest=True,
                **self._settings,
            )  # fmt: skip
        return Pairs(self.folder)
