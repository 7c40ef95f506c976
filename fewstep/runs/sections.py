"""What the sections of a recipe are made of."""

import warnings
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AliasChoices, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fewstep.common.options import Typed, in_one_line

Count = Annotated[int, Field(gt=0)]
Above = Annotated[float, Field(gt=0)]


def _nan_as_text(value: Any) -> Any:
    return "nan" if isinstance(value, float) and value != value else value


# What a condition is where it says nothing. NaN, for a number that is not known, is kept as text, which equals itself.
Blank = Annotated[int | float | Literal["nan"], BeforeValidator(_nan_as_text)]


class Section(Typed):
    """A mapping of a recipe that takes its own keys and no others; a text alone is the value of its ``short`` key."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    short: ClassVar[str | None] = None

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, value: Any) -> Any:
        return {cls.short: value} if cls.short and isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _old_spellings(cls, value: Any) -> Any:
        """Keys that had another name before are taken by it too, with a note."""
        for name, field in cls.model_fields.items():
            old = field.validation_alias.choices[1:] if isinstance(field.validation_alias, AliasChoices) else ()
            for key in old:
                if isinstance(value, Mapping) and value.get(key) is not None:
                    warnings.warn(f"the key {key} of a recipe is now called {name}: both are taken", stacklevel=2)
        return value


class Named(Section):
    """A ``name``, and the options of what it names: ``{name: ITVM, ema: 0.99}``."""

    model_config = ConfigDict(extra="allow")
    short = "name"
    name: str

    @model_validator(mode="before")
    @classmethod
    def _names_something(cls, value: Any) -> Any:
        if not isinstance(value, str | Mapping | Named):
            raise ValueError("input should be a name, or a mapping with a name")
        return value

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def base_section(base: Any, where: str, unnamed: str = "ITVM") -> Named:
    """What an objective stands around, as its recipe says it at the key ``where``: ``unnamed``, if it is not named.

    Raises:
        ValueError: it is neither a name nor a mapping.
    """
    try:
        return Named.model_validate({"name": unnamed, **base} if isinstance(base, Mapping) else base)
    except ValidationError as error:
        raise in_one_line(error, Named, where) from None
