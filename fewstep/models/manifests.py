"""What the files that fewstep writes beside a model's weights say, checked as they are read: they may come from
anybody, and may have been changed."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fewstep.common.model_files import read_json
from fewstep.common.parsing import checked
from fewstep.flows.described import AGAIN, Above, Count, Finite, Said, ShiftSaid

Part = tuple[str | None, str | None]


class Mark(Said):
    """``fewstep.json``: the mark of a folder that fewstep wrote."""

    moments: tuple[Finite, Above] | None = None
    coupling: Annotated[str, Field(max_length=100)] = ""
    chain: Literal["", "masked", "uniform"] = ""


class Diffusion(Said):
    """What the network of an export speaks; ``fewstep.models.export.diffusion_of`` writes it."""

    prediction_type: Literal["velocity", "epsilon", "sample", "v_prediction"]
    timesteps: Above | None = None
    right_angle: Above | None = None
    ends_in_noise: bool = False
    log_ratios: Annotated[list[Finite], Field(min_length=2, max_length=1_000_000)] | None = None
    sigma_data: Above | None = None
    sigma_min: Above | None = None
    sigma_max: Above | None = None


class MapIndex(Said):
    """``model_index.json`` of a flow map."""

    unet: Part | None = None
    transformer: Part | None = None
    vae: Part | None = None
    diffusion: Diffusion | None = None
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.0
    grid: Literal["uniform", "native"] = "uniform"
    shift: ShiftSaid | None = None
    guidance: Finite | None = None
    shape: Annotated[tuple[Count, ...], Field(min_length=2, max_length=4)] | None = None
    text: dict[str, Any] | None = None


class FlowTimes(Said):
    """``scheduler_config.json`` of a flow."""

    num_train_timesteps: Above


def read_mark(folder: Path) -> Mark:
    return _read(Mark, folder / "fewstep.json")


def read_map_index(folder: Path) -> MapIndex:
    return _read(MapIndex, folder / "model_index.json")


def read_timesteps(folder: Path) -> float:
    """How many timesteps the scheduler of an export counts."""
    return _read(FlowTimes, folder / "scheduler" / "scheduler_config.json").num_train_timesteps


def _read(kind: Any, file: Path) -> Any:
    """Raises ``ValueError`` where a key is not what it should be, with its name."""
    return checked(kind, read_json(file), file, AGAIN)
