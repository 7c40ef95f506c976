"""The JSON state of a checkpoint: sealed by its own hash, and read with care."""

import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fewstep.common.errors import shown
from fewstep.common.reading import parse_json, read_text


def seal(state: dict[str, Any]) -> str:
    body = json.dumps(state, sort_keys=True)
    return json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "state": state}, indent=1)


def unseal(file: Path) -> dict[str, Any] | str:
    """The state, or what is wrong with it."""
    try:
        sealed = parse_json(read_text(file), str(file))
        if sealed != parse_json(seal(sealed["state"]), ""):
            return f"{file} is damaged"
        return {"fingerprint": {}, **_State.model_validate(sealed["state"]).model_dump(exclude_unset=True)}
    except FileNotFoundError:
        return f"{file} is missing"
    except OSError as error:
        return f"{file} cannot be read ({error.strerror})"
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return f"{file} is damaged ({'.'.join(map(str, first['loc']))} is {shown(first['input'])})"
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{file} is damaged"


class _Whole(BaseModel):
    """What a checkpoint says of one of its files."""

    bytes: int
    sha256: str


def _moments(moments: list[float]) -> list[float]:
    if not (all(map(math.isfinite, moments)) and moments[1] > 0):
        raise ValueError("a mean and a standard deviation are needed")
    return moments


class _Fingerprint(BaseModel):
    """What decided a run: of its data, what the model has to know."""

    model_config = ConfigDict(extra="allow")
    data_shape: list[Annotated[int, Field(gt=0)]] | None = None
    data_classes: list[str] | None = None
    data_moments: Annotated[list[float], Field(min_length=2, max_length=2), AfterValidator(_moments)] | None = None


class _State(BaseModel):
    """What every checkpoint says, of whatever version; the rest is for those who read it."""

    model_config = ConfigDict(extra="allow")
    step: int = Field(ge=0)
    files: dict[str, _Whole]
    seconds: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    losses: dict[str, float] = {}
    sums: dict[str, tuple[float, float]] = {}
    optimizers: dict[str, list[dict[str, Any]]] = {}
    scaler: dict[str, Any] = {}
    fingerprint: _Fingerprint = _Fingerprint()
    frozen: tuple[float, float] | None = None
    shards: int = Field(default=0, ge=0)
