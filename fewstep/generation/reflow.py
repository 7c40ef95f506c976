"""Reflow: noise and the data that a model makes of it, kept as pairs to train on (arXiv 2209.03003).

A field trained on the pairs of another has straighter trajectories, so fewer steps do. ``fewstep.data.pairs.Pairs``
reads what is written here.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from fewstep.common.console import adding
from fewstep.common.disk import replace_file
from fewstep.common.distributed import choose_device, environment
from fewstep.common.errors import unknown
from fewstep.common.randomness import sample_generators
from fewstep.data.pairs import FACTS, FORMAT, read_facts, read_shard, shard_files, shard_rows
from fewstep.data.shards import MOST_SHARDS
from fewstep.data.texts import Texts
from fewstep.flows.calls import each_call
from fewstep.flows.identity import identity
from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import sample, sample_states
from fewstep.flows.signature import Model, classes_of, shape_of
from fewstep.flows.solvers import CALLS, SOLVERS
from fewstep.flows.sources import source_facts, starting_points
from fewstep.flows.times import step_grid
from fewstep.generation.drawing import check_finite
from fewstep.generation.texts import claim, turns_of, write_texts
from fewstep.latents.encoders import text_identity


def make_pairs(
    field: Model,
    out: str | Path,
    count: int,
    *,
    steps: int,
    solver: str | None = None,
    shape: Sequence[int] | None = None,
    seed: int = 0,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    guidance: float | None = None,
    batch: int = 256,
    shard: int = 10_000,
    device: torch.device | str | None = None,
    states: int | Sequence[float] = 0,
    command: str = "make_pairs with the same arguments",
    progress: Callable[[float, float], None] | None = None,
    rest: bool = False,
) -> int:
    """Draw ``count`` pairs of a velocity field or a flow map into the folder ``out``; returns the shards still missing.

    Pair i of a seed starts from the noise of sample i of that seed, or, between two data sets, from its row of the
    source. The shards in the folder that are whole stay, so a
    call that was stopped, repeated, ends with the same files. Under torchrun or SLURM the processes share out the
    shards, with no word between them: what is missing at the end is still on its way in another process.

    Args:
        field: what is sampled; moved to the device, in evaluation mode.
        out: the folder of ``pairs.json`` and ``pairs-00000.safetensors`` and so on, with ``noise`` and ``data``
            (shard, ...), ``class_labels`` (shard,) where there are any, ``states`` (shard, K, ...) and their ``times``
            (shard, K) where they are asked for; each file is whole or absent.
        steps, solver: see ``fewstep.sample``; by default fields are solved by Heun, two calls a step; a chain
            of blocks by the midpoint rule, which never asks where its velocity jumps.
        shape: one sample's; by default what the model says.
        seed: decides the noise. The noise of ``fewstep sample`` with the same seed is the same.
        labels: classes, given to the pairs in turn; by default all of them, where the model has classes.
        prompts: texts, given to the pairs in turn, for a model of text. Each distinct one is encoded once, and kept in
            float16 in shards of its own, from which the pairs are drawn.
        guidance: the strength that the model is told, where it takes one.
        batch: pairs drawn at once. shard: pairs in a file, and in memory.
        states: K, how many states between noise and data to keep, for :class:`fewstep.Trajectory`: each pair's are
            those after steps of its own, one drawn from each K-th of the steps between. Or the times of all, rising,
            at ends of steps: (0.25, 0.5, 0.75) of 64. Noise and data stay the same.
        device: the default is the process's GPU if there is one, else the CPU.
        command: what to type to go on, told where a shard is missing.
        progress: called with the pairs done and all those of this process, after each call of the model, which does a
            share of its batch.
        rest: afterwards, draw what the other processes have not drawn yet, so that nothing is missing at the end.

    Raises:
        ValueError: arguments that cannot be, a text model without prompts, a model between two data sets whose source
            is not known, a folder of something else or of other pairs; before anything is drawn.

    >>> make_pairs(teacher, "pairs", 50_000, steps=50)
    """
    world = environment()
    out = Path(out).expanduser()
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    settings = settings_of(
        field, count, steps=steps, solver=solver, seed=seed, guidance=guidance, shard=shard, states=states
    )
    facts = {**facts_of(field, shape, labels, prompts, **settings), "command": command}
    claim(out / FACTS, facts, "pairs", read_facts)

    place = choose_device(device, world)
    field = field.to(place).eval()
    texts, which = _texts(field, prompts, out, facts, place)
    mine = turns_of(world, rest)(len(shard_files(out, facts)))
    tick = adding(progress, sum(len(shard_rows(facts, i)) for i in mine))
    calls = steps * CALLS.get(settings["solver"] or "euler", 1)
    for i in mine:
        rows, parts = shard_rows(facts, i), []
        if _is_whole(out, facts, i):
            tick(len(rows))
            continue
        for part in torch.tensor(rows).split(batch):
            with each_call(field, calls, tick, len(part)):
                parts.append(_draw(field, part.tolist(), facts, place, texts, which))
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        check_finite(tensors["data"], f"pairs {rows.start} to {rows.stop - 1}")
        replace_file(shard_files(out, facts)[i], save(tensors))
    return sum(not file.is_file() for file in shard_files(out, facts))


def settings_of(
    field: Model,
    count: int,
    *,
    steps: int,
    solver: str | None = None,
    seed: int = 0,
    guidance: float | None = None,
    shard: int = 10_000,
    states: int | Sequence[float] = 0,
) -> dict[str, Any]:
    """The settings of :func:`make_pairs` as the facts have them.

    Raises:
        ValueError: settings that cannot be.
    """
    for name, value in (("count", count), ("steps", steps), ("shard", shard)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    at, states = ([], states) if isinstance(states, int) else (list(map(float, states)), len(states))
    after = [round(t * steps) for t in at]
    rises = [0, *after, steps] == sorted({0, *after, steps})
    if not rises or any(abs(t * steps - n) > 1e-6 for t, n in zip(at, after, strict=True)):
        raise ValueError(f"states at {at}: they rise between 0 and 1, and are multiples of a step, 1 / {steps}")
    if not 0 <= states < max(steps, 1):
        raise ValueError(f"states is {states}: of {steps} steps, {steps - 1} end between noise and data")
    if states and solver == "adaptive":
        raise ValueError("states are kept at the steps of a solver, and the adaptive one takes its own: say heun")
    if count > shard * MOST_SHARDS:
        raise ValueError(f"{count} pairs are more than {MOST_SHARDS:,} shards of {shard}: take a larger shard")
    if isinstance(field, FlowMap):
        if field.gamma and steps > 1:
            raise ValueError(
                f"this map brings new noise in between its steps (gamma {field.gamma:g}), so that data would not "
                "follow from the noise it is paired with: take steps=1"
            )
        if solver is not None:
            raise ValueError(f"a flow map takes its steps itself: solver={solver!r} is for velocity fields")
    elif (solver := solver or ("heun" if field.path.is_affine else "midpoint")) not in SOLVERS:
        raise unknown("solver", solver, SOLVERS)
    return {
        "count": count, "steps": steps, "solver": solver, "seed": seed, "guidance": guidance, "shard": shard,
        "states": states or None, "path": field.path.quarters if states else None, **({"after": after} if at else {}),
    }  # fmt: skip


def facts_of(
    field: Model,
    shape: Sequence[int] | None,
    labels: Sequence[int] | None,
    prompts: Sequence[str] | None,
    **settings: Any,
) -> dict[str, Any]:
    """What makes one folder of pairs another than the next; the arguments are those of :func:`make_pairs`.

    Raises:
        ValueError: labels that the model does not have, a text model without prompts.
    """
    return {
        "format": FORMAT, "shape": list(shape_of(field) if shape is None else shape), "labels": _labels(field, labels),
        "model": identity(field), "source": source_facts(field), **settings, **_said(field, prompts),
    }  # fmt: skip


def _labels(field: Model, labels: Sequence[int] | None) -> list[int] | None:
    """The classes of the pairs, in turn; None for none."""
    classes = classes_of(field)
    labels = list(range(classes) if labels is None else labels)
    if not all(0 <= label < classes for label in labels):
        has = f"the classes 0 to {classes - 1}" if classes else "no classes (a network says how many as `classes`)"
        raise ValueError(f"labels {labels}: the model has {has}")
    return labels or None


def _said(field: Model, prompts: Sequence[str] | None) -> dict[str, Any]:
    """What the facts say of the prompts; nothing for a model without text."""
    if field.text is None:
        if prompts:
            raise ValueError(f"prompts {list(prompts[:3])}: this model has no text encoders that fewstep knows")
        return {}
    if not prompts:
        raise ValueError("the model is conditioned on text: give it prompts, --prompts FILE or prompts=[...]")
    digest = hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16]
    return {"prompts": f"{len(prompts)} prompts {digest}", "text": text_identity(field.text)}


def _texts(
    field: Model, prompts: Sequence[str] | None, out: Path, facts: dict[str, Any], place: torch.device
) -> tuple[Texts | None, torch.Tensor]:
    """The conditions of the distinct prompts, written to the folder if they are not there; which is each prompt's."""
    if field.text is None or not prompts:
        return None, torch.empty(0)
    distinct: dict[str, int] = {}
    which = torch.tensor([distinct.setdefault(prompt, len(distinct)) for prompt in prompts])
    height, width = (facts["shape"] if field.latents is None else field.latents.image_shape_of(facts["shape"]))[-2:]
    # Each process sees to it that all are there: it draws with them.
    turns = turns_of(environment(), rest=True)
    write_texts(field.text, list(distinct), out, size=(height, width), device=place, turns=turns)
    return Texts(out), which


def _draw(
    field: Model,
    rows: list[int],
    facts: dict[str, Any],
    place: torch.device,
    texts: Texts | None,
    which: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The pairs of these indices, on the CPU; of its prompt, each has the number among the distinct ones."""
    generators = sample_generators(facts["seed"], rows)
    noise = starting_points(field, (len(rows), *facts["shape"]), generators)
    labels = facts["labels"]
    cond = {"class_labels": torch.tensor([labels[i % len(labels)] for i in rows])} if labels else {}
    given: dict[str, Any] = {name: value.to(place) for name, value in cond.items()}
    if texts is not None:
        cond["text"] = which[torch.tensor(rows) % len(which)]
        given |= {name: value.to(place) for name, value in texts.rows(cond["text"]).items()}
    if facts["guidance"] is not None:
        given["guidance"] = torch.full((len(rows),), float(facts["guidance"]), device=place)
    if facts["solver"] is not None:
        given["solver"] = facts["solver"]
    if states := facts.get("states"):
        # One step of each K-th of those between; drawn by each pair's generator, after its noise.
        edges = torch.linspace(1, facts["steps"], states + 1, dtype=torch.float64).floor()
        drawn = torch.stack([torch.rand(states, generator=draw) for draw in generators])
        after = (edges[:-1] + (drawn * edges.diff()).floor()).long()
        if fixed := facts.get("after"):
            after = torch.tensor(fixed).expand(len(rows), -1)
        way = sample_states(field, noise.to(place), facts["steps"], **given).cpu()
        place_of = after.view(*after.shape, *[1] * (way.ndim - 2)).expand(-1, -1, *way.shape[2:])
        times = step_grid(facts["steps"]).float()[after]
        return {"noise": noise, "data": way[:, -1], "states": way.gather(1, place_of), "times": times, **cond}
    return {"noise": noise, "data": sample(field, noise.to(place), facts["steps"], **given).cpu(), **cond}


def _is_whole(out: Path, facts: dict[str, Any], shard: int) -> bool:
    if not shard_files(out, facts)[shard].is_file():
        return False
    try:
        read_shard(out, facts, shard)
    except ValueError:
        return False
    return True
