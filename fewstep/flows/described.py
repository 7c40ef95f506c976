"""What a file says of a model in words, checked as it is read: it may come from anybody, and may have been changed."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

AGAIN = "export the model again"

Finite = Annotated[float, Field(allow_inf_nan=False)]
Above = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0, le=1 << 24)]


class Said(BaseModel):
    """The keys that fewstep reads; there may be others."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class Made(Said):
    """A class and what it was made with."""

    name: str
    options: dict[str, Any] = {}


class Network(Made):
    """A network of fewstep's own by its options, or one around a model of diffusers by its class and config."""

    model: str | None = None
    config: dict[str, Any] = {}
    size: int | tuple[int, ...] | None = None


class Scheduler(Said):
    name: str
    config: dict[str, Any]


class ShiftSaid(Said):
    """A ``fewstep.pipelines.shifts.Shift``."""

    factor: Above = 1.0
    line: tuple[tuple[Finite, Finite], tuple[Finite, Finite]] | None = None
    kind: Literal["exponential", "linear"] = "exponential"
    terminal: Annotated[float, Field(ge=0, lt=1)] | None = None
    least: Annotated[float, Field(gt=0, lt=1)] | None = None
    most: Annotated[float, Field(gt=0, le=1)] = 1.0
    after: Annotated[float, Field(ge=0, lt=1)] = 0.0
    by_steps: bool = False
    side: Count | None = 1


class Described(Said):
    """A model in words, as ``fewstep.flows.description`` has it."""

    class_name: Literal["FlowMap", "NetworkField"] = Field(alias="_class_name")
    network: Network
    native: Made
    path: Made
    space: Made | None = None
    prediction: str
    shape: Annotated[tuple[Count, ...], Field(min_length=1, max_length=4)] | None = None
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.0
    grid: Literal["uniform", "native"] = "uniform"
    shift: ShiftSaid | None = None
    guidance: Finite | None = None
    scheduler: Scheduler | None = None
