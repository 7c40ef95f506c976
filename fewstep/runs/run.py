"""Whole runs: from a recipe to a trained model in its folder, and from the folder back to the model."""

import signal
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from fewstep.common import distributed
from fewstep.common.disk import sweep
from fewstep.common.distributed import World
from fewstep.common.locks import BusyError, owned
from fewstep.common.trust import code_in, remember
from fewstep.data.couplings import uncoupled
from fewstep.evaluation.results import Evaluation
from fewstep.flows.signature import Model
from fewstep.runs.build import build, held_against, parts_of_blocks
from fewstep.runs.datasets import make_data, settled
from fewstep.runs.judge import judge, prepare
from fewstep.runs.loading import Trained, open_run, recipe_of, teacher_of
from fewstep.runs.previews import Watch
from fewstep.runs.recipe import Recipe
from fewstep.training import checkpoints, fingerprint, folder, interrupt
from fewstep.training.blocks import fit_blocks
from fewstep.training.fit import fit
from fewstep.training.leaving import check_from_recipe
from fewstep.training.run import Result
from fewstep.training.run_files import CHAIN, CHECKPOINTS, RECIPE


@dataclass(frozen=True)
class Finished:
    """What a run came to: the training, and its evaluation where it got that far."""

    result: Result[Model]
    evaluation: Evaluation | None


def run(recipe: Recipe, out: Path, *, fresh: bool = False) -> Finished:
    """Train what the recipe says in the run folder ``out``, and judge it; goes on where an earlier start stopped.

    Args:
        fresh: throw away the run that is in ``out`` and start again.

    Raises:
        ValueError: parts that do not fit, or a folder of something else; before anything is computed or overwritten.
        TrainingError: see ``fewstep.fit``.
    """
    folder.check_ours(out)
    if recipe.blocks is not None:
        return Finished(_train_blocks(recipe, recipe.blocks, out, fresh), None)
    if (out / CHAIN).is_file():
        raise ValueError(f"{out} has a chain of blocks: take another folder for a run of another kind")
    is_main = distributed.environment().is_main
    if not fresh:
        check_from_recipe(out)
    with owned(out, "trained") if is_main else nullcontext(), folder.unless_refused(out if is_main else None):
        return _run(recipe, out, fresh, is_main)


def _train_blocks(recipe: Recipe, lengths: Sequence[float], out: Path, fresh: bool) -> Result[Any]:
    """The chain of blocks that a recipe says, in the folder ``out``, with a run for each."""
    built = parts_of_blocks(recipe)
    student: Any = built.student
    training: dict[str, Any] = {**recipe.training.model_dump(), "ou_times": lengths, "seed": recipe.seed}
    result = fit_blocks(student, built.data, objective=built.objective, out=out, resume=not fresh, **training)
    _write_recipe(out, recipe)
    return result


def _run(recipe: Recipe, out: Path, fresh: bool, is_main: bool) -> Finished:
    built = build(recipe, out, fresh)
    recipe = built.recipe
    if not fresh:
        fingerprint.check_recipe(out, recipe.fingerprint())
    if recipe.evaluation.count:
        prepare(recipe, uncoupled(built.data), built.student)
    if is_main:
        _begin(out, recipe, fresh)
    world = distributed.environment()
    device = distributed.choose_device(recipe.training.device, world)
    is_sharded = recipe.training.shard is not None
    if built.teacher is not None and not is_sharded:  # an objective without a teacher would leave it where it is
        built.teacher.to(device)
    watch = Watch(recipe, uncoupled(built.data), built.teacher, out)
    with interrupt.catch(signal.SIGTERM):  # which ends the process once the run is whole, not before
        result = fit(
            built.student,
            built.objective,
            built.data,
            seed=recipe.seed,
            out=out,
            callbacks=[watch],
            fingerprint=recipe.fingerprint(),
            resume=not fresh,
            **recipe.training.model_dump(),
        )
        if is_sharded:  # all that was shared out is whole again, on the CPU
            result.ema.to(device)
            if built.teacher is not None:
                built.teacher.to(device)
        if is_main:
            # Only now: one that went on may have got other steps, and `fit` has seen that it is the same run.
            _write_recipe(out, recipe)
            watch.draw(result.ema, result.step)
    if result.stopped == "interrupted" or recipe.evaluation.count == 0:
        return Finished(result, None)
    model, quiet = cast(Model, result.ema), recipe.training.quiet
    with distributed.join(world, device):
        evaluation = judge(model, recipe, uncoupled(built.data), built.teacher, out, quiet=quiet, world=world)
    return Finished(result, evaluation)


def evaluate_run(
    path: Path,
    device: str | None = None,
    teacher: str | None = None,
    data: str | None = None,
    opened: Trained | None = None,
    **changes: Any,
) -> Evaluation | None:
    """Judge a run at its last checkpoint: the processes that torchrun, ``accelerate launch`` or SLURM started share the
    samples, and the main one writes the report.

    Args:
        teacher, data: what it is held against, where that has moved, or never had a name.
        opened: the run, if it is open.
        changes: keys of ``evaluation``, and ``seed``.

    Raises:
        BusyError: another process judges it. A training may go on the while, which judges the run once more at its end.
    """
    run, world = opened or open_run(path), distributed.environment()
    place = distributed.choose_device(device, world)
    with ExitStack() as stack:
        stack.enter_context(distributed.join(world, place))
        try:
            if world.is_main:
                stack.enter_context(owned(path, "evaluated"))
                sweep(path)
        except BusyError as busy:
            if busy.doing != "trained":
                raise
        return _evaluate(run, path, place, world, teacher, data, **changes)


def _evaluate(
    run: Trained, path: Path, place: torch.device, world: World, teacher: str | None, data: str | None, **changes: Any
) -> Evaluation | None:
    tree = run.recipe.as_dict()
    tree["seed"] = changes.pop("seed", tree["seed"])
    tree["evaluation"] |= changes
    if teacher is not None:
        tree["teacher"] = {**(tree["teacher"] or {}), "source": teacher}
    if data is not None:
        tree["data"] = {"name": data}
    recipe = recipe_of(path, tree)
    field = teacher_of(recipe)
    if data is not None:
        recipe = settled(recipe, field or run.model)  # pyright: ignore[reportArgumentType]
    # With the seed that its samples were drawn with.
    rows = make_data(recipe.model_copy(update={"seed": run.recipe.seed}), field, path)
    field = held_against(recipe, field, rows)
    field = None if field is None else field.to(place)
    return judge(run.model.to(place), recipe, uncoupled(rows), field, path, world=world)


def _begin(out: Path, recipe: Recipe, fresh: bool) -> None:
    """Write the recipe of a run that starts. One that goes on keeps its own until ``fit`` has compared the two."""
    if fresh:
        folder.throw_away(out)
    if not checkpoints.steps_in(out / CHECKPOINTS):
        folder.begin(out)
        _write_recipe(out, recipe)


def _write_recipe(out: Path, recipe: Recipe) -> None:
    folder.write_recipe(out, recipe.as_dict())
    remember(out, out / RECIPE, code_in(recipe.as_dict()))
