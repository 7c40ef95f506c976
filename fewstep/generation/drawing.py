"""Samples of a trained model: what it takes, and what it draws, a batch at a time."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fewstep.common.randomness import sample_generators
from fewstep.flows.calls import count_calls
from fewstep.flows.exact import ExactField
from fewstep.flows.fields import VelocityField
from fewstep.flows.guided import Guided
from fewstep.flows.sampling import check_options, sample
from fewstep.flows.signature import Model, check_image, classes_of, device_of, network_of, shape_of, takes
from fewstep.flows.sources import starting_points
from fewstep.generation.requests import Encoded, Request, Requests
from fewstep.generation.steered import Steered
from fewstep.networks import MLP


def draw(
    model: Model,
    count: int,
    steps: int,
    *,
    shape: tuple[int, ...] | None = None,
    seed: int = 0,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    given: Mapping[str, Tensor] | None = None,
    decode: bool = False,
    batch: int = 256,
    guidance: float | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor], float]:
    """Samples (count, ...) on the CPU, their conditions, and how often the network was called for each.

    Sample i of a seed is the same for any ``count`` and ``batch``.

    Args:
        shape: of one sample; by default what the model says.
        labels: classes, given to the samples in turn; by default all of them, where the model has classes.
        prompts: texts, given to the samples in turn; their conditions are not among those returned.
        given: other conditions, (n, ...) each, their rows given to the samples in turn.
        decode: samples in the units of the data of a model that has ``moments``, and images instead of latents.
        guidance: the strength of guidance, for a model that takes it; a text model that does not is guided away from
            what it does without a prompt.
        options: those of ``fewstep.sample``.

    Raises:
        ValueError: no samples asked for, labels that the model does not have, a text model without prompts or another
            with them, a model of an image without one, or as ``fewstep.sample``.
    """
    if count < 1 or batch < 1:
        raise ValueError(f"count is {count} and batch is {batch}: at least one sample is needed")
    requests = settled(
        model, Requests(count, seed, prompts=prompts or (), labels=() if labels is None else labels), given
    )
    given = {name: value[torch.arange(count) % len(value)] for name, value in (given or {}).items()}
    batches = [range(start, min(start + batch, count)) for start in range(0, count, batch)]
    with count_calls(model) as calls:
        drawn = draw_batches(
            model, requests, batches, steps, shape=shape, given=given, decode=decode, guidance=guidance, **options
        )
        samples = torch.cat([part for _, part in drawn])
    return samples, {**labels_of(requests), **given}, calls.rows / count


def settled(model: Model, requests: Requests, given: Mapping[str, Tensor] | None = None) -> Requests:
    """What is asked of a model, with the classes in it where none were named: all of them, in turn.

    Raises:
        ValueError: labels that the model does not have, a text model without prompts or another with them, a model of
            an image without one.
    """
    classes, inner = classes_of(model), network_of(model)
    labels = requests.labels if len(requests.labels) else range(classes)
    if classes and not all(0 <= label < classes for label in labels):
        raise ValueError(f"labels {_few(labels)}: the model has the classes 0 to {classes - 1}")
    if labels and not classes and (isinstance(inner, MLP | ExactField) or hasattr(inner, "classes")):
        raise ValueError(f"labels {_few(labels)}: the model has no classes")
    check_image(model, given or {})
    if model.text is None and requests.prompts:
        raise ValueError(f"prompts {_few(requests.prompts)}: this model has no text encoders that fewstep knows")
    if model.text is not None and not requests.prompts and "encoder_hidden_states" not in (given or {}):
        raise ValueError('the model is conditioned on text: give it prompts, --prompt "a cat" or prompts=["a cat"]')
    return replace(requests, labels=labels)


def labels_of(requests: Requests) -> dict[str, Tensor]:
    """The condition ``class_labels`` (count,) of all that is asked for; nothing where there are no classes."""
    if not len(requests.labels):
        return {}
    return {"class_labels": torch.tensor([requests[i].label for i in range(requests.count)])}


def _few(values: Sequence[Any]) -> str:
    return f"{list(values)}" if len(values) <= 8 else f"[{', '.join(map(repr, values[:8]))}, ...]"


def draw_batches(
    model: Model,
    requests: Requests,
    batches: Sequence[Sequence[int]],
    steps: int,
    *,
    shape: tuple[int, ...] | None = None,
    size: tuple[int, int] | None = None,
    given: Mapping[str, Tensor] | None = None,
    decode: bool = False,
    guidance: float | None = None,
    steered: Steered | None = None,
    **options: Any,
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """The samples of each batch of rows (their places in ``requests``), on the CPU, as they are done.

    Args:
        requests: as :func:`settled` gives them.
        batches: the rows of each call of the network; drawn one after the other, so that memory holds one.
        size: height and width of the images in pixels, for models that are told.
        steered: draws each sample from a population of its own, and keeps what became of that.
        shape, given, decode, guidance, options: as for :func:`draw`.

    Raises:
        ValueError: at once, a strength of guidance that the model is not told, and as ``fewstep.sample``; later,
            samples that are not finite.
    """
    each = 1 if steered is None else steered.particles
    model, begin, conditions = _starts(model, requests, batches, shape, size, given, guidance, each)
    check_options(model, steps, shape=shape, **options)
    draw_rows = sample if steered is None else steered.seen(partial(finished, model))

    def made() -> Iterator[tuple[Sequence[int], Tensor]]:
        begun = begin(batches[0]) if batches else None
        for rows, following in pairwise([*batches, None]):
            assert rows is not None
            assert begun is not None
            wanted, generators, noise = begun
            samples = draw_rows(model, noise, steps, **options, **conditions(rows, wanted, generators))
            check_finite(samples, f"samples {rows[0]} to {rows[-1]}")
            samples = finished(model, samples) if decode else samples
            # While a GPU is at work, the noise of the next batch is drawn on the CPU.
            begun = None if following is None else begin(following)
            yield rows, samples.cpu()

    return made()


def one_batch(
    model: Model,
    requests: Requests,
    *,
    shape: tuple[int, ...] | None = None,
    size: tuple[int, int] | None = None,
    given: Mapping[str, Tensor] | None = None,
    guidance: float | None = None,
) -> tuple[Model, Tensor, dict[str, Any]]:
    """All that is asked for as one batch, before it is sampled: the model, guided where it is to be, the noise
    (B, ...) and the conditions; arguments and errors as those of :func:`draw_batches`."""
    rows = range(requests.count)
    model, begin, conditions = _starts(model, requests, [rows], shape, size, given, guidance)
    wanted, generators, noise = begin(rows)
    cond = conditions(rows, wanted, generators)
    cond.pop("generator", None)
    return model, noise, cond


Begun = tuple[list[Request], list[torch.Generator], Tensor]


def _starts(
    model: Model,
    requests: Requests,
    batches: Sequence[Sequence[int]],
    shape: tuple[int, ...] | None,
    size: tuple[int, int] | None,
    given: Mapping[str, Tensor] | None,
    guidance: float | None,
    each: int = 1,
) -> tuple[
    Model,
    Callable[[Sequence[int]], Begun],
    Callable[[Sequence[int], list[Request], list[torch.Generator]], dict[str, Any]],
]:
    """The model, guided where it is to be, and what makes of rows their noise, and their conditions: ``each`` of them
    for a row, side by side."""
    device = device_of(model)
    encoded = None
    if model.text is not None and requests.prompts:
        uses = Counter(str(requests[row].prompt) for rows in batches for row in rows)
        encoded = Encoded(model.text, uses, device, size)
        is_bare = not isinstance(model, Guided) and not takes(model, "guidance")
        if guidance is not None and is_bare and isinstance(model, VelocityField):
            model, guidance = Guided(model, guidance, null=model.text.null(device)), None
    if guidance is not None:
        check_strength(model, guidance)

    def begin(rows: Sequence[int]) -> tuple[list[Request], list[torch.Generator], Tensor]:
        """One generator a sample, for its first noise and for all that is added later."""
        wanted = [requests[row] for row in rows]
        own = [(w.seed, range(w.index * each, (w.index + 1) * each)) for w in wanted]
        generators = [one for seed, indices in own for one in sample_generators(seed, indices)]
        return wanted, generators, starting_points(model, (len(generators), *(shape or shape_of(model))), generators)

    def conditions(rows: Sequence[int], wanted: list[Request], generators: list[torch.Generator]) -> dict[str, Any]:
        cond: dict[str, Any] = {}
        if len(requests.labels):
            cond["class_labels"] = torch.tensor([w.label for w in wanted], device=device)
        cond |= {name: value[torch.tensor(rows) % len(value)].to(device) for name, value in (given or {}).items()}
        if encoded is not None:
            cond |= encoded([str(w.prompt) for w in wanted])
        if guidance is not None:
            cond["guidance"] = torch.full((len(rows),), guidance, device=device)
        if each > 1:
            cond = {name: value.repeat_interleave(each, 0) for name, value in cond.items()}
        return cond | {"generator": generators}

    return model, begin, conditions


def check_strength(model: Model, guidance: float) -> None:
    """That a model is told how strongly it is to be guided.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(model, Guided) and not takes(model, "guidance"):
        raise ValueError(
            f"guidance {guidance:g}: the model is told no strength of it. Recipes guide a teacher (teacher.guidance), "
            "and Python any field: Guided(field, scale, null=...)"
        )


def check_finite(samples: Tensor, what: str) -> None:
    """That what a model gave is numbers.

    Raises:
        ValueError: some are NaN or infinite; names ``what`` they are.
    """
    if not samples.isfinite().all():
        raise ValueError(
            f"the model gave numbers that are not finite for {what}: its weights are damaged, its "
            "training diverged, or its numbers are too large for this dtype"
        )


def finished(model: Model, samples: Tensor) -> Tensor:
    """What a model's samples (B, ...) are to be looked at as: in the units of its data, or images of its latents."""
    if model.moments is not None:
        mean, std = model.moments
        samples = samples * std + mean
    return samples if model.latents is None else model.latents.decode(samples)
