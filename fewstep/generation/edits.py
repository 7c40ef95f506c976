"""Pictures of others changed by a model: read as its data are, told what they are and what they are to be, edited."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.common.errors import unknown
from fewstep.common.randomness import sample_generators
from fewstep.common.reading import check_memory, no_file
from fewstep.data.decode import decode, size_of
from fewstep.data.listing import open_folder
from fewstep.flows.editing import check_edit, flow_edit, invert, resume, sdedit
from fewstep.flows.fields import VelocityField
from fewstep.flows.guided import Guided
from fewstep.flows.signature import Model, device_of, takes
from fewstep.generation.drawing import check_finite, check_strength, finished, labels_of, settled
from fewstep.generation.requests import Encoded, Requests

# How much of the way to noise and back each walks where nothing is said.
STRENGTHS = {"flow-edit": 0.7, "sdedit": 0.5, "invert": 1.0}
METHODS = tuple(STRENGTHS)


@dataclass(frozen=True)
class Told:
    """What pictures are, or are to be: classes or prompts, given to them in turn, and how strongly that is meant."""

    labels: Sequence[int] = ()
    prompts: Sequence[str] = ()
    guidance: float | None = None


def picture_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files of pictures, and those in folders, in order.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or no picture in a folder.
    """
    files: list[Path] = []
    for path in (Path(path).expanduser() for path in paths):
        if path.is_dir():
            folder = open_folder(path, "all")
            files += [folder.root / name for name in folder.names]
        elif why := no_file(path):
            raise FileNotFoundError(f"the picture {path} cannot be read: {why}")
        else:
            files.append(path)
    return files


def read_pictures(files: Sequence[Path], shape: tuple[int, ...]) -> tuple[np.ndarray, str]:
    """Pictures as (N, C, H, W) uint8 of one ``shape`` (C, H, W), and a note on those that were of another size.

    As in the data that models learn from: turned as the camera says, on white where they are transparent, grey or
    colour as the model is, of 16 bits the upper 8; of another size the middle is cut out and scaled.

    Raises:
        ValueError: samples of this shape are no images, a file is none that can be read, or all do not fit in memory.
    """
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(
            f"the samples of this model have the shape {shape} and are no images: fewstep.flow_edit, sdedit and invert "
            "take tensors"
        )
    check_memory(f"{len(files):,} pictures at once", len(files) * prod(shape), "edit some of them at a time")
    pixels, others = np.empty((len(files), *shape), np.uint8), []
    for i, file in enumerate(files):
        picture = decode(file, (shape[1], shape[2]), shape[0])
        if isinstance(picture, str):
            raise ValueError(f"the picture {file} cannot be read: {picture}")
        pixels[i] = picture
        if (size := size_of(file)) != shape[1:]:
            others.append(f"{file.name}, {size[1]} x {size[0]}")
    if not others:
        return pixels, ""
    which = others[0] if len(files) == 1 else f"{len(others)} of {len(files)}, such as {others[0]}"
    return pixels, f"the model's images are {shape[2]} x {shape[1]}: the middle is cut out and scaled ({which})"


def settle(
    model: Model, method: str, count: int, seed: int, target: Told, source: Told
) -> tuple[Model, Requests, Requests]:
    """What a model is asked for each picture, and what it is told that the picture is; the model as it is then called.

    Raises:
        ValueError: a method that is not known; a class, a prompt or a strength of guidance that the model does not
            take, or that is needed and not given.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    has_source = method != "sdedit"
    if not has_source and (source.labels or source.prompts or source.guidance is not None):
        raise ValueError(f"--from-label, --source-...: {method} does not ask what the pictures are, leave them out")
    wanted = settled(model, Requests(count, seed, prompts=target.prompts, labels=target.labels))
    if len(wanted.labels) and not target.labels:
        raise ValueError("--label: this model draws classes: which one are the pictures to be?")
    prompts = source.prompts or ([""] if has_source and model.text is not None else [])
    told = settled(model, Requests(count, seed, prompts=prompts, labels=source.labels)) if has_source else wanted
    if has_source and len(told.labels) and not source.labels:
        raise ValueError(f"--from-label: {method} is told what the pictures are; sdedit needs no such thing")
    if method == "flow-edit" and not len(wanted.labels) and not wanted.prompts:
        raise ValueError("flow-edit goes from one condition to another, and this model has none: --method sdedit")
    for strength in (target.guidance, source.guidance):
        if strength is not None and not isfinite(strength):
            raise ValueError(f"the guidance scale is {strength}: a finite number is needed, 1 is none")
    if target.guidance is not None or source.guidance is not None:
        is_bare = not isinstance(model, Guided) and not takes(model, "guidance")
        if is_bare and model.text is not None and isinstance(model, VelocityField):
            model = Guided(model, 1.0, null=model.text.null(device_of(model)))
        check_strength(model, target.guidance if target.guidance is not None else source.guidance or 0.0)
    return model, wanted, told


def edit_batches(
    model: Model,
    pixels: np.ndarray,
    method: str,
    steps: int,
    wanted: Requests,
    told: Requests,
    *,
    strength: float | None = None,
    guidance: tuple[float | None, float | None] = (None, None),
    average: int = 1,
    tolerance: float | None = None,
    size: tuple[int, int] | None = None,
    batch: int = 64,
) -> Iterator[tuple[range, Tensor, Tensor | None]]:
    """The rows of each batch, their edited images (B, C, H, W) in [-1, 1] on the CPU, and the residual (B,) of an
    inversion. Picture i of a seed has the same noise in any batch.

    Args:
        pixels: as :func:`read_pictures` gives them. wanted, told: as :func:`settle` gives them.
        strength, average, tolerance: see ``fewstep.flow_edit`` and ``fewstep.invert``.
        guidance: of what is wanted, and of what is told that the pictures are.

    Raises:
        ValueError: at once, steps, a strength or a batch that cannot be; later, a residual above the tolerance, or
            images that are not finite.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}: at least one picture")
    strength = STRENGTHS[method] if strength is None else strength
    check_edit(model, steps, strength, is_onward=method == "sdedit")
    device = device_of(model)
    target_of, source_of = (
        _conditions(model, requests, w, size) for requests, w in zip((wanted, told), guidance, strict=True)
    )

    def edited(x: Tensor, rows: range) -> tuple[Tensor, Tensor | None]:
        target = target_of(rows)
        noise: dict[str, Any] = {"strength": strength, "generator": sample_generators(wanted.seed, rows)}
        if method == "sdedit":
            return sdedit(model, x, steps, **noise, **target), None
        source = source_of(rows)
        if method == "flow-edit":
            return flow_edit(model, x, source, target, steps, average=average, **noise), None
        state, residual = invert(model, x, steps, strength=strength, tolerance=tolerance, **source)
        solver = "heun" if isinstance(model, VelocityField) else "euler"
        return resume(model, state, steps, solver=solver, **noise, **target), residual.cpu()

    def made() -> Iterator[tuple[range, Tensor, Tensor | None]]:
        for start in range(0, len(pixels), batch):
            rows = range(start, min(start + batch, len(pixels)))
            x, residual = edited(units_of(model, torch.from_numpy(pixels[start : rows.stop]).to(device)), rows)
            check_finite(x, f"the pictures {rows[0]} to {rows[-1]}")
            yield rows, finished(model, x).cpu(), residual

    return made()


def units_of(model: Model, pixels: Tensor) -> Tensor:
    """Images (B, C, H, W) uint8 in the units of a model, which :func:`fewstep.generation.drawing.finished` undoes."""
    images = pixels.float().sub_(127.5).div_(127.5)
    if model.latents is not None:
        images = model.latents.encode(images)
    if model.moments is not None:
        mean, std = model.moments
        images = (images - mean) / std
    return images


def _conditions(
    model: Model, requests: Requests, guidance: float | None, size: tuple[int, int] | None
) -> Callable[[range], dict[str, Any]]:
    """What a model is told of rows."""
    device, labels, encoded = device_of(model), labels_of(requests), None
    if model.text is not None:
        uses = Counter(str(requests[i].prompt) for i in range(requests.count))
        encoded = Encoded(model.text, uses, device, size)

    def conditions(rows: range) -> dict[str, Any]:
        cond = {name: value[rows.start : rows.stop].to(device) for name, value in labels.items()}
        if encoded is not None:
            cond |= encoded([str(requests[i].prompt) for i in rows])
        if guidance is not None:
            cond["guidance"] = torch.full((len(rows),), guidance, device=device)
        return cond

    return conditions
