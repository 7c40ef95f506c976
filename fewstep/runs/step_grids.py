"""The grids of few steps that were found for a run, kept in its folder with all that they were found with."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, field_validator, model_validator
from torch import Tensor

from fewstep.common.console import say
from fewstep.common.disk import replace_file
from fewstep.common.parsing import checked
from fewstep.common.reading import parse_json, read_text
from fewstep.flows.fields import VelocityField
from fewstep.flows.signature import Model
from fewstep.flows.step_grids import FoundGrid, beside_uniform, check_steps, step_errors
from fewstep.flows.times import check_grid, step_grid
from fewstep.generation.drawing import one_batch
from fewstep.generation.requests import Requests
from fewstep.training.run_files import STEP_GRIDS

CANDIDATES = 24
_POINTS, _IMAGES = 256, 16  # trajectories that a grid is found on
_USUAL = (2, 3, 4, 6, 8)  # numbers of steps that are measured with the one that is asked for
_KEPT = 32  # grids of other weights, guidance, ... that are kept beside


class _Grid(BaseModel):
    """A grid, and how far it and the uniform one end from the reference."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    times: list[float]
    error: float
    uniform_error: float

    @field_validator("times")
    @classmethod
    def _rising(cls, times: list[float]) -> list[float]:
        check_grid("times", torch.tensor(times, dtype=torch.float64))
        return times


class _Found(BaseModel):
    """What grids were found with, and those of each number of steps."""

    model_config = ConfigDict(extra="forbid")

    found_with: dict[str, str | float | list[int] | None]
    grids: dict[int, _Grid]

    @model_validator(mode="after")
    def _counted(self) -> "_Found":
        if wrong := [n for n, grid in self.grids.items() if len(grid.times) != n + 1]:
            raise ValueError(f"the grid of {wrong[0]} steps has {len(self.grids[wrong[0]].times)} times")
        return self


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: int = 1
    found: list[_Found] = []


def found_with(
    model: Model,
    weights: str,
    *,
    solver: str,
    gamma: float | None,
    guidance: float | None,
    shape: Sequence[int],
    by: str,
) -> dict[str, Any]:
    """What a grid is right for: the weights, the solver or re-noising, the guidance, the shape; and what it was held
    against."""
    own = getattr(model, "scale", None) if isinstance(model, VelocityField) else getattr(model, "guidance", None)
    if (other := getattr(model, "scale_2", None)) is not None:
        own = [own, other]
    if isinstance(model, VelocityField):
        gamma = None
    else:
        solver, gamma = "map", float(getattr(model, "gamma", 0.0) if gamma is None else gamma)
    return {
        "weights": weights, "solver": solver, "gamma": gamma, "guidance": own if guidance is None else float(guidance),
        "shape": list(shape), "reference": by, "candidates": float(CANDIDATES),
    }  # fmt: skip


def grid_for(
    model: Model,
    reference: Model,
    requests: Requests,
    steps: int,
    facts: Mapping[str, Any],
    *,
    folder: Path | None = None,
    alone: bool = True,
    solver: str = "euler",
    gamma: float | None = None,
    batch: int = 256,
    **told: Any,
) -> Tensor:
    """The better of the optimal and the uniform grid of this many steps; a line says how far both end from the
    reference, and another where the grid comes from.

    Args:
        reference: as for ``step_errors``.
        requests: what is sampled, of which the trajectories get the classes and prompts.
        facts: those of :func:`found_with`: a grid that was found with others is not taken.
        folder: a run, in which grids are kept; None for what has no folder of fewstep's.
        alone: whether this is the only process: several take a grid that is kept, and look for none.
        batch: trajectories at once, at most.
        told: shape, size, given and guidance, as for ``draw_batches``.

    Raises:
        ValueError: as ``step_errors``; several processes, and no grid is kept.
    """
    check_steps(steps, CANDIDATES)
    file = None if folder is None else folder / STEP_GRIDS
    kept = _File() if file is None else _read(file)
    mine = next((found for found in kept.found if found.found_with == dict(facts)), None)
    if mine is None or steps not in mine.grids:
        if not alone:
            raise ValueError(
                f"no grid of {steps} steps is kept in {file or 'a run'}: --grid optimal in one process finds it, then "
                "several take it"
            )
        if mine is None and kept.found:
            say(f"{file}: its grids were found with {_difference(kept.found[-1].found_with, facts)}: found anew")
        wanted = sorted({*_USUAL, steps} if mine is None else {steps})
        grids = _find(model, reference, requests, wanted, solver=solver, gamma=gamma, batch=batch, **told)
        mine = mine or _Found(found_with=dict(facts), grids={})
        mine.grids |= grids
        if file is not None:
            _keep(file, _File(found=[*(found for found in kept.found if found is not mine), mine][-_KEPT:]))
    elif file is not None:
        say(f"{file}: the grid of {steps} steps was found before")
    grid = mine.grids[steps]
    found = FoundGrid(step_grid(1).new_tensor(grid.times), grid.error, grid.uniform_error)
    say(f"{found}" + (": the uniform one is taken" if found.is_uniform else ""))
    return found.times


def _find(
    model: Model,
    reference: Model,
    requests: Requests,
    steps: Sequence[int],
    *,
    solver: str,
    gamma: float | None,
    batch: int,
    given: Mapping[str, Tensor] | None = None,
    **told: Any,
) -> dict[int, _Grid]:
    own = _POINTS if len(told["shape"]) == 1 else _IMAGES
    rows = max(2, min(own, batch))
    which = f"{steps[0] if len(steps) == 1 else 'few'} steps"
    say(f"the grid of {which}: found on {rows} trajectories, measured on {rows} others")
    is_own = reference is model
    asked = Requests(2 * rows, 0, 0, requests.prompts, requests.labels)
    model, noise, cond = one_batch(model, asked, given=given or None, **told)
    first, second = (
        {"noise": noise[half], "solver": solver, "gamma": gamma, **{name: value[half] for name, value in cond.items()}}
        for half in (slice(rows), slice(rows, None))
    )
    reference = model if is_own else reference
    errors = step_errors(model, reference, candidates=CANDIDATES, **first)
    found = beside_uniform(errors, model, reference, steps=steps, **second)
    return {
        grid.steps: _Grid(times=grid.optimal.tolist(), error=grid.error, uniform_error=grid.uniform_error)
        for grid in found
    }


def _difference(kept: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """What sets two apart, in words: ``guidance 2, not 3``."""
    names = [name for name in facts if kept.get(name) != facts[name]]
    if "weights" in names:
        return "other weights"
    return ", ".join(f"{name} {_shown(kept.get(name))}, not {_shown(facts[name])}" for name in names)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return (
        f"{value:g}" if isinstance(value, float) else " x ".join(map(str, value)) if isinstance(value, list) else value
    )


def _read(file: Path) -> _File:
    """What is kept; a file that cannot be read is as good as none, which a line says."""
    if not file.is_file():
        return _File()
    try:
        return checked(_File, parse_json(read_text(file), str(file)), file, "remove it")
    except ValueError as error:
        say(f"{error}: grids are found anew")
        return _File()


def _keep(file: Path, grids: _File) -> None:
    tree = {"format": grids.format, "found": [found.model_dump() for found in grids.found]}
    try:
        replace_file(file, (json.dumps(tree, indent=1) + "\n").encode())
    except OSError as error:
        say(f"the grids are not kept: {error}")
