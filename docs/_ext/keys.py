"""The text of the pages on recipes: every key with its type, default and meaning, and every recipe with its comments.

All of it is read off the typed recipe, the signatures and the docstrings, so that there is nothing to keep by hand.
"""

import inspect
import re
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import AliasChoices, BaseModel
from pydantic.fields import FieldInfo

import fewstep
from fewstep import data
from fewstep.data import images as pictures
from fewstep.objectives import OBJECTIVES
from fewstep.runs.recipe import Named, Recipe
from fewstep.runs.recipes import describe, known_recipes

SIMPLE = {int: "whole number", float: "number", str: "text", bool: "`true` or `false`", Any: "anything"}
MANY = {"whole number": "whole numbers", "number": "numbers", "text": "texts"}
# What reads the files that `data` names by their path.
FILES: dict[str, Callable[..., Any]] = {
    "a folder of pictures": pictures.image_folder,
    "`hf:NAME`, or a folder of `save_to_disk`": pictures.hugging_face,
    "a `.npy` or `.npz` file": data.files.npy,
    "a folder of IDX files": data.files.idx,
    "a folder of `fewstep reflow`": data.Pairs,
    "a folder of `fewstep encode`": data.Encoded,
}
# Options that several loaders share and only their module describes.
SHARED = {
    "flip": "mirror rows at random, left to right: not for letters or maps",
    "labels": "take the labels as the condition `class_labels`; `false` leaves them out",
    "normalize": "bring the numbers to mean 0 and standard deviation 1; samples are brought back",
    "channels_last": "the rows are (H, W, C); `null` looks at the shape",
    "split": "`train` or `test`",
    "classes": "the names of the classes, in their order",
}


class Row(NamedTuple):
    key: str  # of the anchor
    shown: str
    kind: str
    default: str
    meaning: str


def keys() -> str:
    """Every key of a recipe, a section a heading; then the options of each method and of each kind of data."""
    parts = [_section("The keys at the top", Recipe, "")]
    for prefix, section, what in sections(Recipe):
        parts.append(_section(f"`{prefix}`", section, f"{prefix}.", what))
    return "\n\n".join([*parts, _methods(), _data()])


def sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel], str]]:
    """The sections inside a section: dotted names, types, and what the key that holds each is for."""
    for name, field in model.model_fields.items():
        inner = _inner(field.annotation)
        if inner is not None:
            yield f"{prefix}{name}", inner, field.description or ""
            yield from sections(inner, f"{prefix}{name}.")


def dotted(model: type[BaseModel] = Recipe) -> list[str]:
    """Every key there is, options of what is named aside: ``training.lr``."""
    inside = [f"{prefix}.{name}" for prefix, section, _ in sections(model) for name in section.model_fields]
    return [*model.model_fields, *inside]


def _inner(annotation: Any) -> type[BaseModel] | None:
    kinds = [annotation, *get_args(annotation)]
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)


def _section(title: str, model: type[BaseModel], prefix: str, what: str = "") -> str:
    rows = [_row(f"{prefix}{name}", field) for name, field in model.model_fields.items()]
    if issubclass(model, Named):
        rows = [Row(row.key, row.shown, row.kind, row.default, row.meaning or what) for row in rows]
    said = inspect.cleandoc(model.__doc__ or "") if model.__doc__ else ""
    short = getattr(model, "short", None)
    if short and prefix:
        said += f"\n\nA text alone is `{prefix}{short}`: `{prefix[:-1]}: TEXT`, or `--{prefix[:-1]} TEXT`."
    if issubclass(model, Named):
        said = (
            f"A `name`, and the options of what it names, side by side: `{prefix[:-1]}: {{name: NAME, OPTION: VALUE}}`."
        )
        said += f" A text alone is the name: `--{prefix[:-1]} NAME`."
    return f"## {title}\n\n{_prose(said)}\n\n{_table(rows)}"


def _row(key: str, field: FieldInfo) -> Row:
    text = field.description or ""
    if olds := _old_spellings(field):
        text += f" (old spelling, which still works: {', '.join(f'`{old}`' for old in olds)})"
    return Row(key, key, _kind(field.annotation, field.metadata), _default(field), text)


def _old_spellings(field: FieldInfo) -> list[str]:
    alias = field.validation_alias
    return [str(choice) for choice in alias.choices[1:]] if isinstance(alias, AliasChoices) else []


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    return "" if isinstance(value, BaseModel) else _yaml(value)


def _yaml(value: Any) -> str:
    if value is None:
        return "`null`"
    value = list(value) if isinstance(value, tuple) else value
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix('...' + chr(10)).strip()}`"


def _kind(annotation: Any, metadata: Any = ()) -> str:
    """A type in words."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if annotation in SIMPLE:
        return f"{SIMPLE[annotation]}{_bounds(metadata)}"
    if hasattr(annotation, "__metadata__"):  # Annotated
        limits = [m for given in annotation.__metadata__ for m in getattr(given, "metadata", [given])]
        return _kind(inside[0], limits)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(kind, metadata) for kind in inside if kind is not type(None))
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inside)
    if origin in (tuple, list, Sequence) or annotation in (tuple, list):
        if not inside:
            return "list"
        kind = _kind(inside[0])
        first, bounds = (kind.partition(",")[0], kind.partition(",")[1:])
        many = f"{MANY.get(first, first)}{''.join(bounds)}"
        return f"{len(inside)} {many}" if origin is tuple and inside[-1] is not Ellipsis else f"list of {many}"
    if origin is dict or annotation is dict:
        return f"mapping of names to {MANY.get(_kind(inside[1]), 'values')}" if inside else "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section" if not issubclass(annotation, Named) else "a name and options"
    return getattr(annotation, "__name__", str(annotation))


def _bounds(metadata: Any) -> str:
    said = []
    for limit in metadata:
        match limit:
            case Gt(gt=low):
                said.append(f"above {low:g}")
            case Ge(ge=low):
                said.append(f"{low:g} or more")
            case Lt(lt=high):
                said.append(f"below {high:g}")
            case Le(le=high):
                said.append(f"{high:g} at most")
    return f", {', '.join(said)}" if said else ""


def _methods() -> str:
    parts = [
        "## `objective`: the options of each method\n\n`objective: {name: NAME, OPTION: VALUE}`, or `--objective NAME "
        "--objective.OPTION VALUE`. An option that a method does not have is refused by name. With `teacher: none` "
        "among them, the teacher of the recipe only judges. `finish: corrected` or `finish: adversarial` among the "
        "options of a method that trains a map is short for that objective with the method as its `base`; `[corrected, "
        "adversarial]` for both, and `{name: corrected, weight: 0.3}` with options."
    ]
    for name, method in OBJECTIVES.items():
        rows = arguments_of(method, f"objective.{name}", skip=("teacher",))
        parts.append(f"### {name}\n\n{{py:class}}`fewstep.{name}`\n\n{_table(rows)}")
    return "\n\n".join(parts)


def _data() -> str:
    parts = [
        "## `data`: the options of each kind of data\n\n`data: {name: NAME, OPTION: VALUE}`, or `--data NAME "
        "--data.OPTION VALUE`. [Data](../guides/data.md) says what the kinds are."
    ]
    named = {f"`{name}`": load for name, load in data.NAMED.items()}
    plain = [name for name, load in named.items() if not arguments_of(load, "data")]
    if plain:
        parts.append(f"Without options: {', '.join(plain)}.")
    for title, load in (named | FILES).items():
        if title in plain:
            continue
        skip = tuple(inspect.signature(load).parameters)[:1] if title in FILES else ()
        if rows := arguments_of(load, f"data.{title.strip('`')}", skip):
            parts.append(f"### {title}\n\n{_table(rows)}")
    return "\n\n".join(parts)


def arguments_of(made: Callable[..., Any], prefix: str, skip: tuple[str, ...] = ()) -> list[Row]:
    """A row for each argument of a function or class, what it means as its docstring says."""
    meanings, rows = meanings_of(made), []
    try:
        hints = inspect.get_annotations(made.__init__ if inspect.isclass(made) else made, eval_str=True)
    except NameError:
        hints = {}
    for name, parameter in inspect.signature(made).parameters.items():
        if name in skip or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        default = "needed" if parameter.default is parameter.empty else _yaml(parameter.default)
        meaning = meanings.get(name) or (SHARED.get(name, "") if prefix.startswith("data.") else "")
        rows.append(Row(f"{prefix}.{name}", name, _kind(hints.get(name, Any)), default, meaning))
    return rows


def meanings_of(made: Callable[..., Any]) -> dict[str, str]:
    """What the docstring of a function or class says of each argument; where it says ``see X``, what X says of it."""
    found: dict[str, str] = {}
    text = inspect.getdoc(made) or ""
    block = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, re.M | re.S)
    for entry in re.split(r"\n(?= {4}\S)", block[1].rstrip()) if block else ():
        names, _, meaning = " ".join(entry.split()).partition(": ")
        for name in names.split(", "):
            found[name.strip("`* ")] = meaning
    for name, meaning in list(found.items()):
        if (of := re.match(r"see :class:`~?(?:[\w.]+\.)?(\w+)`", meaning)) and (other := getattr(fewstep, of[1], None)):
            found |= {other_name: said for other_name, said in meanings_of(other).items() if other_name == name}
            if name == "options":
                found = meanings_of(other) | found
    for base in getattr(made, "__mro__", ())[1:-1]:
        if base.__module__.startswith("fewstep."):
            found = meanings_of(base) | found
    return found


def _table(rows: list[Row]) -> str:
    if not rows:
        return "It has no options."
    lines = [
        "```{list-table}",
        ":class: keys keys-4",
        ":header-rows: 1",
        "",
        "* - key",
        "  - type",
        "  - default",
        "  - meaning",
    ]
    for row in rows:
        lines += [f"* - [`{row.shown}`]{{#{anchor(row.key)}}}", f"  - {row.kind}", f"  - {row.default}"]
        lines.append(f"  - {_prose(row.meaning)}")
    return "\n".join([*lines, "```"])


def anchor(key: str) -> str:
    return "key-" + re.sub(r"\W+", "-", key).strip("-").lower()


def _prose(text: str) -> str:
    """Docstring text as MyST: literals in single backticks, names of the package as links."""
    text = text.replace("``", "`")
    text = re.sub(r":(?:class|func|meth):`~?([\w.]+)`", r"`\1`", text)
    text = re.sub(r"(?<!`)`(fewstep\.\w+)`(?!`)", r"{py:obj}`\1`", text)
    return re.sub(r"(?<![`{\w])<([^>`]*)>", r"\\<\1>", text)


def recipes() -> str:
    """Every recipe that comes along: its first line as what it is, and its whole text, comments and all."""
    parts = []
    for name, path in known_recipes().items():
        what = describe(path)
        said, _, more = what.partition(": ")
        said += f". {more[:1].upper()}{more[1:]}." if more else "."
        parts.append(f"## `{name}`\n\n{said}\n\n```yaml\n{Path(path).read_text().rstrip()}\n```")
    return "\n\n".join(parts)
