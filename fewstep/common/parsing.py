"""YAML that may be anybody's, as plain values: what is too large or too deep is refused in a line, and short texts that
stand for a billion values before they are built. And values as what they are to be."""

import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from fewstep.common.errors import briefly, shortened, shown

_DEEPEST = 50  # levels: recipes and configurations have five
_MOST = 100_000  # values, with aliases counted as often as they stand
_LONGEST = 1 << 19  # characters of YAML, which is read at some 100,000 a second

Checked = TypeVar("Checked", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML with floats as everybody writes them, where YAML 1.1 takes 1e-3 for text, and with null as a key: what YAML
    takes for nothing is a name there, as in ``guidance: {scale: 3, null: text}``."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise yaml.YAMLError(f"it is nested deeper than {_DEEPEST} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _size_of(node, {}) > _MOST:
            raise yaml.YAMLError(f"it stands for more than {_MOST:,} values")
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        return {"null" if key is None else key: value for key, value in super().construct_mapping(node, deep).items()}


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _size_of(node: Any, known: dict[int, int]) -> int:
    """How many values a node of YAML stands for, its aliases among them; more than any limit for one that holds
    itself."""
    if id(node) not in known:
        known[id(node)] = _MOST + 1  # met again before it is done, it holds itself
        inside = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for item in inside for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_size_of(part, known) for part in parts)
    return known[id(node)]


def parse_yaml(text: str) -> Any:
    """The values of a text in YAML, without tags of Python's.

    Raises:
        ValueError: it is no YAML, nested too deep, too long, or short for too much.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"it has {len(text):,} characters, and {_LONGEST:,} are read at most")
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError) as error:
        # Others than YAMLError come of numbers and dates that cannot be.
        raise ValueError(_why(error)) from None


def checked(kind: type[Checked], value: Any, where: str | Path, way_out: str) -> Checked:
    """What a file says, as what it is to say.

    Raises:
        ValueError: a key that is missing or is not of its kind, by name; ``way_out`` stands at the end.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "all of it"
        said = "is missing" if first["type"] == "missing" else f"is {shown(first['input'])}: {first['msg']}"
        raise ValueError(shortened(f"{where} is not as fewstep writes it, {key} {said}") + f": {way_out}") from None


def _why(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    return briefly(error)
