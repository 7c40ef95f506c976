"""Values from text, checked against what takes them: YAML, keys and types, and names of things in Python files."""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, create_model, field_validator

from fewstep.common.errors import shown, unknown
from fewstep.common.parsing import parse_yaml
from fewstep.common.reading import read_text
from fewstep.common.trust import check_code


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ValueError: it is not YAML, or holds something else.
    """
    text = read_text(path)
    try:
        tree = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is no recipe: a mapping with data, objective, ... is needed")
    return tree


def as_yaml(tree: Mapping[str, Any]) -> str:
    """The text of a YAML file, which ``read_yaml`` reads back as the same."""
    return yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)


def parse_value(key: str, text: str) -> Any:
    """A value as YAML reads it: ``0.99``, ``1e-3``, ``[1, 2]``, ``null``, ``true``, text."""
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{key}: {shown(text)} cannot be read as a YAML value ({error})") from None


def find_object(spec: str, *kinds: type) -> Any:
    """What ``FILE.py:NAME`` or ``MODULE:NAME`` stands for: a class of one of these kinds, or a function that returns
    one. It is looked at, not called. A function of an installed module says by its annotation what it returns.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no such module, no such name in it, or something of another kind; or no code is to run here.
    """
    check_code(spec)
    place, _, name = spec.rpartition(":")
    if place.endswith(".py"):
        module = _module_of(Path(place).expanduser().resolve())
    else:
        try:
            module = importlib.import_module(place)
        except (ModuleNotFoundError, TypeError, ValueError) as error:  # of a name with dots, or an empty one
            missing = getattr(error, "name", None) or place
            raise ValueError(f"{spec!r}: no module {missing!r} is installed (a file is FILE.py:NAME)") from None
    if not hasattr(module, name):
        raise unknown(f"name in {place}", name, [n for n in vars(module) if not n.startswith("_")])
    found = getattr(module, name)
    if why := _unfit(found, kinds, module.__name__ if place.endswith(".py") else None):
        raise ValueError(f"{spec!r} is {why}: it is not called")
    return found


def _unfit(found: Any, kinds: tuple[type, ...], own: str | None) -> str:
    """Why something is neither a class of these kinds nor a function that returns one; empty where it is.

    Args:
        own: the module of a file of the user's, whose functions need not say what they return.
    """
    wanted = " or ".join(kind.__name__ for kind in kinds)
    if isinstance(found, type):
        return "" if issubclass(found, kinds) else f"a class {found.__name__}, and a {wanted} is wanted"
    function = inspect.unwrap(found) if callable(found) else None
    if not isinstance(function, FunctionType):
        return f"a {type(found).__name__}, and a class {wanted} is wanted, or a function that returns one"
    try:
        said = get_type_hints(function).get("return")
    except (NameError, TypeError, AttributeError):  # an annotation that cannot be read says nothing
        said = None
    classes = [kind for kind in (said, *get_args(said)) if isinstance(kind, type) and kind not in (Any, object)]
    if any(issubclass(kind, kinds) or issubclass(kinds[0], kind) for kind in classes):
        return ""
    if classes:
        return f"a function that returns a {classes[0].__name__}, and a {wanted} is wanted"
    if function.__module__ == own:
        return ""
    return f"a function that does not say by an annotation, `-> {kinds[0].__name__}`, that it returns a {wanted}"


@cache
def _module_of(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    # By its path, so that two files of one name do not meet.
    name = f"fewstep_file_{path.stem}_{abs(hash(path))}"
    module = sys.modules[name] = ModuleType(name)
    module.__file__ = str(path)
    try:
        # Compiled from the text that one can read: bytecode in a __pycache__ beside it may be of something else.
        exec(compile(path.read_bytes(), path, "exec"), vars(module))
    except SyntaxError as error:
        del sys.modules[name]
        raise ValueError(f"{path} is no Python: {error.msg} at line {error.lineno}") from None
    except BaseException:
        del sys.modules[name]
        raise
    return module


class Typed(BaseModel):
    """Values by their types, of which true and false are no numbers: pydantic alone takes them for 1 and 0."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_flag_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool):
            kinds = kinds_in(cls.model_fields[str(info.field_name)].annotation)
            if not kinds.isdisjoint((int, float)) and kinds.isdisjoint((bool, Any)):
                raise ValueError("input should be a number")
        return value


def kinds_in(annotation: Any) -> set[Any]:
    """The kinds that a type hint allows: ``int | list[float] | None`` gives int, list and NoneType."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return {kind for one in get_args(annotation) for kind in kinds_in(one)}
    if origin is Annotated:
        return kinds_in(get_args(annotation)[0])
    if origin is Literal:
        return {type(value) for value in get_args(annotation)}
    return {origin or annotation}


def arguments(
    where: str, function: Callable[..., Any], options: Mapping[str, Any], given: tuple[str, ...] = ()
) -> dict[str, Any]:
    """``options`` checked against the signature of what takes them, types and all, with its defaults filled in.

    Args:
        where: the dotted key of the options, for errors.
        given: parameters that do not come from the recipe.

    Raises:
        ValueError: an option that is not known, is missing, or is not of its type.
    """
    hints = get_type_hints(function.__init__ if isinstance(function, type) else function)
    fields: dict[str, Any] = {}
    is_open = False
    for p in inspect.signature(function).parameters.values():
        is_open |= p.kind is p.VAR_KEYWORD
        if p.name not in given and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            fields[p.name] = (hints.get(p.name, Any), ... if p.default is p.empty else p.default)
    extra = "allow" if is_open else "forbid"

    # What nan and inf mean to a function of the user's, it knows; to fewstep's own they mean nothing.
    any_number = not function.__module__.startswith("fewstep.")

    class Options(Typed):
        model_config = ConfigDict(
            extra=extra, allow_inf_nan=any_number, arbitrary_types_allowed=True, protected_namespaces=()
        )

    model = create_model("Options", __base__=Options, **fields)
    try:
        filled = model.model_validate(dict(options))
    except ValidationError as error:
        raise in_one_line(error, model, where) from None
    return {name: getattr(filled, name) for name in (*fields, *(filled.model_extra or {}))}


def in_one_line(
    error: ValidationError,
    model: type[BaseModel],
    where: str = "",
    inside: Callable[[], Mapping[str, Iterable[str]]] = dict,
) -> ValueError:
    """The first of pydantic's complaints, with the dotted key; of an unknown key, the nearest and all known ones.

    Args:
        inside: gives the keys of sections that the model leaves open, by section; they are suggested too.
    """
    first = error.errors(include_url=False)[0]
    keys = [str(part) for part in first["loc"]]
    if kinds := _kinds_of(model, keys):  # of a union, pydantic says what the first of its kinds would be
        return ValueError(f"{'.'.join([where, keys[0]] if where else keys[:1])} is {shown(first['input'])}: {kinds}")
    dotted = ".".join([where, *keys] if where else keys)
    if first["type"] == "missing":
        return ValueError(f"{dotted} is needed and not given")
    if first["type"] == "extra_forbidden":
        return _unknown_key(dotted, model, keys, inside())
    said = first["msg"].removeprefix("Value error, ")
    if "instance of Sequence" in said or said.endswith("valid tuple") or said.endswith("valid list"):
        example = f", such as [{first['input']}]" if isinstance(first["input"], int | float) else ""
        said = f"Input should be a list{example}"
    if first["type"] in ("bool_parsing", "bool_type"):
        said = "Input should be true or false"
    return ValueError(f"{dotted} is {shown(first['input'])}: {said[0].lower()}{said[1:]}")


_KINDS: dict[Any, str] = {
    bool: "true, false", int: "a whole number", float: "a number", str: "text", list: "a list in [ ]",
    tuple: "a list in [ ]", dict: "a mapping of options",
}  # fmt: skip


def _kinds_of(model: type[BaseModel], keys: list[str]) -> str:
    """What an option that may be of several kinds, a list or a mapping among them, is to be; empty for others."""
    if len(keys) != 2 or keys[0] not in model.model_fields:
        return ""
    kinds = kinds_in(model.model_fields[keys[0]].annotation)
    if len(kinds - {type(None)}) < 2 or kinds.isdisjoint((dict, list, tuple)):
        return ""
    return f"input should be {' or '.join(said for kind, said in _KINDS.items() if kind in kinds)}"


def _unknown_key(
    dotted: str, model: type[BaseModel], keys: list[str], inside: Mapping[str, Iterable[str]]
) -> ValueError:
    *parents, key = keys
    known = _keys_at(model, parents)
    # The same key in another section is the likeliest slip: `lr` for `training.lr`, `size` for `data.size`.
    sections = {name: _keys_at(model, [name]) for name in model.model_fields if name not in inside}
    sections |= {section: list(names) for section, names in inside.items()}
    near = [f"{section}.{key}" for section, names in sections.items() if key in names]
    if not near:
        places = {name: ".".join([*parents, name]) for name in known}
        for section, names in sections.items() if not parents else ():
            places = {name: f"{section}.{name}" for name in names} | places  # the first section that has it
        prefix = dotted.removesuffix(".".join(keys))
        found = get_close_matches(key.lower().replace("_", "."), [*places.values()], n=1, cutoff=0.8)
        near = found or [places[name] for name in get_close_matches(key.lower(), places, n=1, cutoff=0.5)]
        near = [prefix + name for name in near]
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ValueError(f"unknown recipe key {dotted!r}: {hint}Known: {', '.join(sorted(known)) or 'none'}")


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """The keys of the section at ``path``; none where that is no section."""
    for key in path:
        annotation = model.model_fields[key].annotation
        inner = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)
