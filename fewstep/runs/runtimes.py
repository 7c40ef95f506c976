"""Flow maps as programs for other runtimes: ``torch.export`` and ONNX, which need neither fewstep nor diffusers.

A program is the bare map ``X_{s,t}(x)``: the network and the arithmetic of its path, for batches of any size.
"""

import inspect
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import copy, deepcopy
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.common.errors import briefly, shortened, unknown
from fewstep.common.randomness import generator
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Path as Trajectory
from fewstep.flows.paths import VariancePreserving
from fewstep.flows.signature import classes_of, image_channels, shape_of
from fewstep.flows.tabulated import Tabulated
from fewstep.models.lora import has_lora, merge_lora
from fewstep.models.writing import aside, check_target, write_json
from fewstep.runs.loading import load
from fewstep.runs.program_card import program_card, program_config

FORMATS = {"torch": "map.pt2", "onnx": "map.onnx"}
Run = Callable[[dict[str, Tensor]], Tensor]
# The largest difference from the model itself that is taken for rounding.
TOLERANCE = 1e-4
# Batches that a program is checked at; it is traced at the first, 0 and 1 rows being special to torch.
_ROWS = (3, 1, 2)


@dataclass(frozen=True)
class Program:
    """What was written: ``difference`` is the largest from the model itself on random inputs, relative to the largest
    output where that is above 1; ``largest_batch`` the most rows in a call, None for any number."""

    folder: Path
    file: str
    difference: float
    largest_batch: int | None


def export_program(
    model: FlowMap | str | Path,
    folder: str | Path,
    format: str = "onnx",
    *,
    conditions: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
    trust: bool = False,
) -> Program:
    """Write the bare map as a program with inputs x (B, ...), s and t (B,) and the conditions that it needs, and output
    ``X_{s,t}(x)``; float32, on the CPU, with B open.

    The folder has the program (``map.onnx`` or ``map.pt2``), ``config.json`` (inputs and their shapes) and a
    ``README.md`` with the lines that sample it. It is written only once the program gives what the model gives.

    Args:
        model: a flow map, or the folder of one: whatever ``fewstep.load`` takes. An adapter is merged.
        format: onnx, or torch (``torch.export``).
        conditions: a row or more of those that the model is called with; by default those of its classes, of a prompt
            where it has text encoders, of an image and of the strength of guidance. Numbers of tokens stay as they are.
        overwrite: whether an export that is there already is replaced.
        trust: as for :func:`fewstep.load`.

    Raises:
        ValueError: no flow map, an unknown format, conditions that are missing, a network that cannot be traced, or a
            program that differs from the model by more than 1e-4 (relative, for outputs above 1).
        FileExistsError: there is an export already, and overwrite is not set.
        ImportError: onnx, onnxscript or onnxruntime are not installed.

    >>> fewstep.runs.runtimes.export_program(student, "fast-onnx").difference
    2.4e-07
    """
    folder = Path(folder).expanduser().resolve()
    if format not in FORMATS:
        raise unknown("format of a program", format, FORMATS)
    if format == "onnx" and not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        raise ImportError("ONNX needs the packages onnx, onnxscript and onnxruntime: pip install 'fewstep[onnx]'")
    check_target(folder, overwrite, model)
    model = load(model, trust=trust) if isinstance(model, str | Path) else model  # pyright: ignore[reportAssignmentType]
    if not isinstance(model, FlowMap):
        raise ValueError(f"a {type(model).__name__} is no flow map, and a program is one: distill it first")
    if isinstance(model.path, VariancePreserving):
        raise ValueError(f"a map on {model.path} looks whether its times are too late, which a program cannot")
    model = merge_lora(model) if has_lora(model) else deepcopy(model)
    model = model.cpu().float().eval().requires_grad_(False)
    program = Bare(model, example_conditions(model, conditions))
    with aside(folder, model) as part:
        traced = _traced(program)
        run, largest = (_write_torch if format == "torch" else _write_onnx)(traced, part / FORMATS[format])
        difference = _difference(program, run)
        if not difference <= TOLERANCE:  # nor NaN
            raise ValueError(
                f"the program differs from the model by {difference:.1e}, more than rounding ({TOLERANCE:g}), and is "
                "not written"
            )
        facts = {"format": format, "file": FORMATS[format], "largest_batch": largest, "largest_difference": difference}
        config = program_config(model, program.inputs(1), facts)
        write_json(part / "config.json", config)
        (part / "README.md").write_text(program_card(model, folder.name, config))
    return Program(folder, FORMATS[format], difference, largest)


class Bare(nn.Module):
    """A flow map with its conditions by place, ``program(x, s, t, *conditions)``, as programs are called."""

    def __init__(self, model: FlowMap, conditions: Mapping[str, Tensor]) -> None:
        super().__init__()
        native, path = (traceable(each, model.prediction) for each in (model.native, model.path))
        self.map = FlowMap(model.network, native, model.prediction, path=path)
        self.conditions, self.shape, self.classes = dict(conditions), shape_of(model), classes_of(model)

        def forward(x: Tensor, s: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
            return self.map(x, s, t, **dict(zip(conditions, cond, strict=True)))

        # The inputs of a program are called what the arguments of forward are.
        names = ("x", "s", "t", *conditions)
        named: Any = forward
        named.__signature__ = inspect.Signature(
            [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        )
        self.forward = forward

    def inputs(self, rows: int) -> dict[str, Tensor]:
        """Random inputs by name."""
        g = generator(0, rows)
        low, high = torch.rand(2, rows, generator=g).sort(dim=0).values
        low[0], high[0] = 0, 1
        cond = {name: value[torch.arange(rows) % len(value)] for name, value in self.conditions.items()}
        if "class_labels" in cond and self.classes:
            cond["class_labels"] = torch.randint(self.classes, (rows,), generator=g)
        return {"x": torch.randn(rows, *self.shape, generator=g), "s": low, "t": high, **cond}


class Counted(Tabulated):
    """A tabulated path whose place in the table is counted: no other runtime has torch's binary search."""

    def place_in(self, table: Tensor, value: Tensor) -> Tensor:
        return (value[..., None] >= table).sum(-1) - 1


def traceable(path: Trajectory, kind: str) -> Trajectory:
    """The same path, of operations that every runtime has, and with numbers where a trace would look into tensors."""
    made = Counted(path.log_ratios, path.ends_in_noise) if type(path) is Tabulated else copy(path)
    ends = path.hold_range(kind)
    object.__setattr__(made, "hold_range", lambda _: ends)
    return made


def example_conditions(model: FlowMap, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A row or more of each condition that the map is called with.

    Raises:
        ValueError: one that it needs is not known.
    """
    cond = dict(given or {})
    shape, network = shape_of(model), model.network
    if classes_of(model):
        cond.setdefault("class_labels", torch.zeros(1, dtype=torch.long))
    if model.text is not None and "encoder_hidden_states" not in cond:
        cond = {**model.text.encode(["an image"]), **cond}
    if channels := image_channels(model):
        cond.setdefault("image", torch.zeros(1, channels, *shape[1:]))
    if _is_told_strength(network):
        cond.setdefault("guidance", torch.tensor([model.guidance or 1.0]))
    missing = [name for name in getattr(network, "needed", []) if name not in cond]
    if missing:
        raise ValueError(
            f"the map needs the condition {missing[0]}, and it is not known what one looks like: give a row of each, "
            f"export_program(..., conditions={{{', '.join(f'{name!r}: tensor' for name in missing)}}})"
        )
    # Labels as they are, numbers as the network has them.
    return {name: value.cpu() if value.dtype == torch.long else value.cpu().float() for name, value in cond.items()}


def _is_told_strength(network: Any) -> bool:
    config = getattr(network, "config", None)
    return bool(getattr(network, "takes_guidance", isinstance(config, dict) and config.get("guidance", False)))


def _traced(program: Bare) -> Any:
    """The program as torch sees it, with the number of rows left open.

    Raises:
        ValueError: it cannot be followed.
    """
    inputs = program.inputs(_ROWS[0])
    with torch.no_grad():
        program(*inputs.values())  # what paths keep is made now, of real numbers
    open_rows = tuple({0: torch.export.Dim.AUTO} for _ in inputs)
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(program, tuple(inputs.values()), dynamic_shapes=open_rows)
    except Exception as error:  # torch raises what it likes
        inner = getattr(program.map.network, "model", program.map.network)
        raise ValueError(
            f"torch.export cannot follow a map of a {type(inner).__name__} on {program.map.path}: "
            f"{type(error).__name__}: {shortened(str(error), 300)}"
        ) from error


def _write_torch(traced: Any, file: Path) -> tuple[Run, int | None]:
    """Write what ``torch.export.load`` reads; returns the program as it is read back, and the most rows of a call."""
    for node in traced.graph.nodes:
        node.meta.pop("stack_trace", None)  # places on this machine
    content = BytesIO()  # where torch itself writes a file, a full disk ends the process
    torch.export.save(traced, content)
    file.write_bytes(content.getbuffer())
    loaded = torch.export.load(file).module()
    return lambda inputs: loaded(*inputs.values()), _most_rows(traced)


def _most_rows(traced: Any) -> int | None:
    """The most rows of a call, which a model may limit: U-Nets of diffusers look whether they are 64 or more."""
    largest = min((bound.upper for bound in traced.range_constraints.values()), default=None)
    return int(largest) if largest is not None and largest.is_Integer else None


def _write_onnx(traced: Any, file: Path) -> tuple[Run, int | None]:
    """Write an ONNX model; returns it as onnxruntime runs it. It has no largest batch: what differs above one is where
    the numbers lie in memory."""
    import onnxruntime

    op: Any = import_module("onnxscript").opset18

    def hypot(x: Any, y: Any) -> Any:
        return op.Sqrt(op.Add(op.Mul(x, x), op.Mul(y, y)))

    def atan2(y: Any, x: Any) -> Any:
        half = op.Cast(op.Div(y, op.Add(hypot(x, y), x)), to=1)  # in float32: onnxruntime has no other arc tangent
        return op.CastLike(op.Add(op.Atan(half), op.Atan(half)), x)

    def squeeze(x: Any, dim: int) -> Any:  # which leaves a longer dimension alone in torch, and fails in ONNX
        return op.Squeeze(x, op.Constant(value_ints=[dim])) if x.shape[dim] == 1 else op.Identity(x)

    aten = torch.ops.aten
    missing = {torch.ops.prims.hypot.default: hypot, aten.atan2.default: atan2, aten.squeeze.dim: squeeze}
    try:
        with _quiet():
            made: Any = torch.onnx.export(traced, dynamo=True, verbose=False, custom_translation_table=missing)
        for value in (*made.model.graph.inputs, *made.model.graph.outputs):
            value.shape[0] = "batch"
        made.model.graph.outputs[0].name = "output"
        for part in (made.model, made.model.graph, *made.model.graph.all_nodes(), *made.model.functions.values()):
            part.metadata_props.clear()  # what torch notes for itself, with places on this machine
        made.save(file)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    except OSError:  # of writing it
        raise
    except Exception as error:  # torch and onnxruntime raise what they like
        reason = re.search(r"No ONNX function found for .*?overload", str(error))
        said = reason.group() if reason else str(error)
        raise ValueError(f"the map cannot be said in ONNX: {shortened(said, 300)}") from error
    return lambda inputs: torch.from_numpy(session.run(None, {n: v.numpy() for n, v in inputs.items()})[0]), None


def _difference(program: Bare, run: Run) -> float:
    """The largest difference of a program from the model, relative to its largest output where that is above 1.

    Raises:
        ValueError: the program does not take another number of rows than that it was traced with.
    """
    found = []
    for rows in _ROWS:
        inputs = program.inputs(rows)
        try:
            with torch.no_grad():
                got, wanted = run(inputs), program(*inputs.values())
        except Exception as error:  # the runtimes raise what they like
            raise ValueError(
                f"the program does not take {rows} rows, which is so where a network takes len(tensor), and not "
                f"tensor.shape[0], for their number: {briefly(error)}"
            ) from error
        found.append((got - wanted).abs().max() / wanted.abs().max().clamp(min=1))
    return float(torch.stack(found).max())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes of torch's exporters, which are about their own insides."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
