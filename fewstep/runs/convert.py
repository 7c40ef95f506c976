"""Diffusion models written as flows, with a report of how well the two agree (Diff2Flow, arXiv 2506.02221)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.common.disk import replace_file
from fewstep.common.distributed import World, choose_device
from fewstep.common.randomness import sample_generators
from fewstep.evaluation.agreement import compare_samplers, scheduler_of, steps_for
from fewstep.evaluation.grids import image_grid
from fewstep.flows.fields import NetworkField, VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear
from fewstep.flows.sampling import sample_noise
from fewstep.flows.signature import image_channels
from fewstep.models.conversion import Conversion, describe
from fewstep.models.converted import FLOWS
from fewstep.models.flow_pipeline import place, write_folder
from fewstep.models.lora import has_lora, merge_lora
from fewstep.models.writing import aside, check_target
from fewstep.networks import FAMILIES
from fewstep.runs.loading import load

_SHOWN = 8  # images a row


def convert(
    model: VelocityField | FlowMap | str | Path,
    folder: str | Path,
    *,
    check: bool = True,
    count: int = 8,
    steps: Sequence[int] | None = None,
    seed: int = 0,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    cond: Mapping[str, Tensor] | None = None,
    device: str | None = None,
    overwrite: bool = False,
    trust: bool = False,
    variant: str | None = None,
) -> Conversion:
    """Write a diffusion model as a flow-match one, and report how well the two agree.

    The folder is a diffusers pipeline whose network has the original's weights and answers as a flow does, by the code
    in ``flow_model.py`` (``trust_remote_code=True``); its scheduler is a ``FlowMatchEulerDiscreteScheduler``, and its
    other parts are the original's. :func:`fewstep.load` reads it as the field that was converted, to the bit, and runs
    no code from it. A model that is a flow already is written as it is. The folder appears whole or not at all, with
    the report as ``README.md`` and ``conversion.json``, and ``conversion.png``: the original, the flow, the difference.

    Args:
        model: a field of a diffusers model, or the folder of one, or of a run that trained one.
        check: whether the two samplers are compared; the first thing done, so that what cannot be sampled is not
            written.
        count: samples compared, in one batch.
        steps: numbers of steps (10, 50 and 200).
        seed: decides the noise.
        labels: classes, given to the samples in turn; all by default.
        prompts: texts, given to the samples in turn, for a model with text encoders; none by default, "".
        cond: other conditions, (count, ...) each, by name.
        device: where the samples are drawn, a GPU by default if there is one; a field that is given goes back after.
        overwrite: whether a model that is in ``folder`` already is replaced.
        trust, variant: as for :func:`fewstep.load`.

    Raises:
        ValueError: a model that cannot be converted, ``folder`` is something else than a model, labels or prompts that
            the model does not take, steps that its sampler does not.
        FileNotFoundError: the weights of the VAE are gone, or a text encoder that the comparison needs.
        FileExistsError: there is a model already, and overwrite is not set.

    >>> report = fewstep.convert("./my-ddpm", "./my-flow")
    >>> print(report.verdict)
    """
    folder = Path(folder).expanduser().resolve()
    check_target(folder, overwrite, model)
    field = _convertible(load(model, trust=trust, variant=variant) if isinstance(model, str | Path) else model)
    facts = {**describe(field), **place(field)}
    agreement = grid = None
    if check:
        numbers = steps_for(field, steps)
        if field.text is not None and "encoder_hidden_states" not in (cond or {}):
            _check_text(field.text.folder, facts["missing"])
        home = next(field.parameters()).device
        try:
            field = field.to(choose_device(device, World()))
            noise, given = _start(field, count, seed, labels, prompts, cond)
            agreement, *pictures = compare_samplers(field, noise, numbers, given, seed)
            grid = _grid(field, *pictures)
        finally:
            field.to(home)
    picture = None if grid is None else "conversion.png"
    conversion = Conversion(folder, **facts, agreement=agreement, picture=picture)
    with aside(folder, field) as part:
        write_folder(field, conversion, part)
        if grid is not None:
            replace_file(part / "conversion.png", grid)
        (part / "conversion.json").write_text(conversion.json())
    return conversion


def _convertible(model: Any) -> NetworkField:
    """The field of a diffusers model, without adapters, once it is clear that it can be written as a flow."""
    if isinstance(model, FlowMap):
        raise ValueError("a flow map is no diffusion model: `fewstep export` writes it for diffusers")
    if not isinstance(model, NetworkField):
        raise ValueError(f"a {type(model).__name__} has no network of its own to convert: convert the field inside it")
    field: Any = merge_lora(model) if has_lora(model) else model
    inner: Any = field.network
    name = type(getattr(inner, "model", None)).__name__
    if not isinstance(inner, tuple(FAMILIES.values())):
        known = ", ".join(family.__name__ for family in FAMILIES.values())
        raise ValueError(f"a network {type(inner).__name__} is no model of diffusers: wrap one in {known}")
    if not field.path.same_as(Linear()):
        raise ValueError(f"a flow is written on the linear path, and this field is on {field.path}: field.on(Linear())")
    if not field.is_flow and name not in FLOWS:
        raise ValueError(
            f"a {name} that predicts {field.prediction} has no class that answers as a flow, {', '.join(FLOWS)} have"
        )
    scheduler_of(field)
    return field


def _check_text(folder: Path, missing: Sequence[str]) -> None:
    """That a text model's encoders are there."""
    if absent := [part for part in missing if part.startswith(("text_encoder", "tokenizer"))]:
        raise FileNotFoundError(
            f"no {absent[0]} in {folder}, or not its weights, so prompts cannot be encoded: fetch it, pass the "
            "conditions from Python (cond={...}), or do without the comparison (check=False, --no-check)"
        )


def _start(
    field: Any,
    count: int,
    seed: int,
    labels: Sequence[int] | None,
    prompts: Sequence[str] | None,
    cond: Mapping[str, Tensor] | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The noise that all samples start from, and their conditions."""
    if count < 2:
        raise ValueError(f"count is {count}: two samples at least are compared")
    device, classes = next(field.parameters()).device, field.network.classes
    given = {name: value.to(device) for name, value in (cond or {}).items()}
    if (beside := image_channels(field)) and "image" not in given:
        raise ValueError(
            f"the model takes an image of {beside} channels beside the state: give one from Python, "
            "convert(model, folder, cond={'image': tensor}), or do without the comparison (check=False, --no-check)"
        )
    if labels is not None and (not classes or not all(0 <= label < classes for label in labels)):
        has = f"the classes 0 to {classes - 1}" if classes else "no classes"
        raise ValueError(f"labels {list(labels)}: the model has {has}")
    if prompts is not None and field.text is None:
        raise ValueError("prompts are given, and the model has no text encoders: pass what it takes as cond")
    if classes and "class_labels" not in given:
        turns = list(labels or range(classes))
        given["class_labels"] = torch.tensor([turns[i % len(turns)] for i in range(count)], device=device)
    if field.text is not None and "encoder_hidden_states" not in given:
        texts = list(prompts or [""])
        given |= field.text.encode([texts[i % len(texts)] for i in range(count)], device=device)
    return sample_noise((count, *field.network.shape), sample_generators(seed, range(count))).to(device), given


def _grid(field: NetworkField, original: Tensor, flow: Tensor) -> bytes | None:
    """The original's samples, the flow's and their difference, a row each; None for what is no image."""
    pictures = [samples[:_SHOWN].float() for samples in (original, flow)]
    if field.latents is not None:
        pictures = [field.latents.decode(samples) for samples in pictures]
    first, second = pictures
    if first.ndim != 4 or first.shape[1] not in (1, 3):
        return None
    rows = {"diffusion": first, "flow": second, "difference": second - first}
    return image_grid(torch.cat([*rows.values()]), columns=len(first), labels=list(rows))
