"""Quality against network calls: a few-step model and its teacher side by side, from the same noise."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.common.console import adding
from fewstep.common.distributed import World, environment, join
from fewstep.common.randomness import generator
from fewstep.common.sharing import rounds, told
from fewstep.data.batch import Batch, Data, has_classes
from fewstep.data.buckets import of_one_shape
from fewstep.data.given import as_data
from fewstep.data.toy import Toy
from fewstep.evaluation.checks import check_arguments, check_training, support_of
from fewstep.evaluation.extractor import identity_of
from fewstep.evaluation.inputs import (
    Parts,
    Reader,
    Starts,
    bytes_of_row,
    conditions,
    gather,
    in_batches,
    of_one_condition,
    trained_rows,
    two_sets,
)
from fewstep.evaluation.likelihoods import (
    LIKELIHOODS,
    calls_of,
    check_likelihood,
    likelihood,
    possible_likelihoods,
    rows_judged,
)
from fewstep.evaluation.measure import ENDS, MANY, Judge, Measured, choose_metrics, possible_metrics
from fewstep.evaluation.results import Evaluation
from fewstep.evaluation.variety import SEEDS, diversity
from fewstep.flows.calls import count_calls, each_call
from fewstep.flows.exact import ExactField
from fewstep.flows.fields import VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import sample
from fewstep.flows.signature import device_of

_SOLVE = 128  # midpoint steps to the end points of a teacher without a closed form; Heun would ask at t = 1
_SOLVED = 1000  # images solved so: 256 calls for each are the dearest part of an evaluation
_LARGE = 1 << 30  # bytes of conditions that are kept in memory
_CONDITIONS = 4  # prompts, or other conditions but classes, of which SEEDS samples each are drawn for the diversity


def evaluate(
    model: FlowMap | VelocityField,
    *,
    teacher: VelocityField | None = None,
    data: Any = None,
    steps: Sequence[int] = (1, 2, 4, 8),
    teacher_steps: Sequence[int] | None = None,
    count: int = 10_000,
    extractor: nn.Module | None = None,
    seed: int = 0,
    batch: int = 1000,
    cond: Mapping[str, Tensor | int] | None = None,
    guidance: float | None = None,
    metrics: Sequence[str] | None = None,
    progress: Callable[[float, float], None] | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    training: Any = None,
    shared: bool = False,
) -> Evaluation:
    """Measure ``model`` at each number of steps, and beside it the teacher in Euler steps.

    Sample i starts from the noise of (seed, i) in every row of the table, whatever the batch. What is measured:

    * with a teacher, ``rmse`` to the end points of its ODE (see ``points.rmse``), solved once: exact for a field in
      closed form, else by 128 midpoint steps, of images for the first 1000;
    * points (any shape but (C, H, W)) against fresh rows of the data: ``sliced_w2`` (of 16,000 rows at most),
      ``energy`` (of 5,000 at most) and, in the plane, ``histogram_kl``; where the data or the exact teacher know which
      points are possible (``inside``), the share of samples ``outside``;
    * images, with an extractor, against rows of the data: the Frechet distance of the features, ``fd``, called ``fid``
      with FID's own network alone; their sliced 2-Wasserstein distance, ``feature_w2``; ``kid``; ``precision`` and
      ``recall``; and ``accuracy``, the share of samples in the class that was asked for, where the extractor has
      ``classify`` and there are ``class_labels``;
    * points, or images with an extractor, and a teacher of 16 steps or more: ``diversity``, how far samples are from
      each other, over that of the teacher at its largest number of steps from the same noise (see
      ``variety.diversity``): among 64 samples of each class; where nothing is asked for, among 1000; and where
      something else is, of 64 samples drawn for each of 4 of the conditions (by default not of fewer than 640
      samples, since it would take long);
    * rows of tokens (``fewstep.data.Text``): ``bigram_kl``, the divergence of pairs of neighbours from the data's;
      ``spelling``, the share of words that the text has; ``entropy`` of the tokens in a sample;
    * with ``training`` rows: ``memorisation``, the share of samples that are as near to one of them as 5 % of the data
      are (see ``copies.memorisation``), of 1000 samples and 4000 rows of the data;
    * where ``metrics`` names it: ``nll`` of points, the mean of -log p of 1000 rows of the data in nats;
      ``bits_per_dim`` of images of 8 bits, of 100 rows. They are those of the model's velocity, solved in 100 calls
      with a way back each (see ``likelihoods.likelihood``), and the same at all numbers of steps.

    Args:
        model: the student, or a field to be solved by Euler steps; runs where it is, in eval mode.
        teacher: what it was made from.
        data: as :func:`fewstep.fit` takes it; by default the data of an exact teacher. ``count`` rows of it are
            taken, at random, or all where it has fewer. Of data in buckets, those of the bucket with the most rows.
        steps, teacher_steps: step counts; by default the teacher takes those of the student, and 100.
        count: samples for each. Values at different counts cannot be compared.
        extractor: a network whose features stand for an image; see ``fewstep.evaluation.extractor``.
        batch: samples drawn at once.
        cond: what to ask for: each condition as rows (n, ...), used in turn, or as a whole number n, for labels drawn
            uniformly below it. By default sample i is asked for what row i of the data has; ``{}`` for nothing.
        guidance: the strength that student and teacher are given, for a student that takes it as a condition.
        metrics: which of the above; by default all that can be had, but the likelihoods.
        progress: called with the work done and the whole of it, in calls for a batch, after each call.
        decode: what makes of samples and data the images that the extractor takes, as the VAE of a latent model.
        training: the rows that the model was trained on, as :func:`fewstep.fit` takes them, where ``data`` has others
            of the same source; 100,000 of them, or a GB, at most.
        shared: the processes that torchrun, ``accelerate launch`` or SLURM started, which all call this with the same
            arguments, share the batches of samples. What is found is that of one process; the images shown are with
            the main process alone.

    Raises:
        ValueError: an argument that cannot be, a metric that is unknown or cannot be had, nothing to measure: before
            anything is computed. Samples that are not finite, once there are any.

    >>> columns, rows = evaluate(student, teacher=teacher, data=data, extractor=trained_classifier(data)).table()
    """
    steps = tuple(dict.fromkeys(steps))
    teacher_steps = tuple(dict.fromkeys((*steps, 100) if teacher_steps is None else teacher_steps))
    data = _as_data(data, teacher)
    check_arguments(model, teacher, data, extractor, (*steps, *teacher_steps), count, batch)
    trained = None if training is None else of_one_shape(as_data(training), data.shape)
    check_training(trained, data)
    asked = data.rows(torch.zeros(1, dtype=torch.long), generator(0)).cond if cond is None else cond
    # Conditions of text fill the memory: they are read as they are needed.
    is_large = cond is None and data.size is not None and count * bytes_of_row(asked) > _LARGE
    inside = support_of(data, teacher)
    possible = possible_metrics(
        data.shape,
        teacher is not None,
        extractor,
        is_by_class := has_classes(asked),
        is_diverse=teacher is not None and max(teacher_steps, default=0) >= MANY,
        has_edges=inside is not None,
        has_training=trained is not None,
        has_tokens=(text := data if hasattr(data, "words") else None) is not None,
    )
    names = choose_metrics(metrics, possible, possible_likelihoods(tuple(data.shape)))
    likely = next((name for name in names if name in LIKELIHOODS), None)
    if likely is not None:
        for who in (model, *(() if teacher is None else (teacher,))):
            check_likelihood(who, cond)
    seeds, groups = min(SEEDS, count), 0
    if asked and not is_by_class and "diversity" in names:  # which needs samples of its own
        groups = max(min(_CONDITIONS, count // (10 * SEEDS)), 0 if metrics is None else 1)
        names = names if groups else tuple(name for name in names if name != "diversity")

    solved = 0
    if teacher is not None and any(name in ENDS for name in names):
        is_dear = len(data.shape) == 3 and not isinstance(teacher, ExactField)
        solved = min(count, _SOLVED) if is_dear else count
    plan: list[tuple[str, FlowMap | VelocityField, int]] = [("student", model, n) for n in steps]
    if teacher is not None:
        plan += [("teacher", teacher, n) for n in teacher_steps]
    world = environment() if shared else World()
    batches = rounds(-(-count // batch), world) + groups * rounds(-(-seeds // batch), world)
    calls = sum(n for *_, n in plan) * batches + 2 * _SOLVE * rounds(-(-solved // batch), world)
    first, second = two_sets(data, count, seed)
    judged = first[: rows_judged(tuple(data.shape))]
    calls += 0 if likely is None else calls_of(len(judged), batch, world) * (1 if teacher is None else 2)
    tick = adding(progress, calls)
    together = join(world, device_of(model)) if shared else nullcontext()
    with together, _eval_mode(model, teacher, extractor):
        judge = Judge(names, extractor, decode, inside, is_by_class, text, world)
        learned = None
        if trained is not None and "memorisation" in names:
            learned = gather(trained, trained_rows(trained, seed), seed, 2, True)
        known = judge.learn(gather(data, first, seed, 0, is_large), learned)
        given = conditions(known if cond is None else cond, count, seed)
        if guidance is not None:
            given["guidance"] = torch.full((count,), guidance)
        rows_of = Reader(data, first, seed) if is_large else None
        starts = Starts(tuple(data.shape), seed, batch, given, rows_of)
        if teacher is not None and solved:
            ends = Parts(solved, batch, partial(_ends, teacher, starts, tick))
            # The process that draws a batch has its end points.
            judge.ends = {rows.start: ends.make(rows).data for rows in ends.ranges[world.rank :: world.size]}
        rows, samples, spreads = [], {}, []
        again = [of_one_condition(starts, row, seeds) for row in range(groups)]
        for role, who, n in plan:
            with count_calls(who) as made:
                found = judge.measure(Parts(count, batch, partial(_sampled, role, who, n, starts, tick)), names)
            (called,) = world.sum([made.rows])
            rows.append({"model": role, "steps": n, "nfe": round(called / count), **found.values})
            samples[f"{role} {n}"] = found.shown
            apart = [Parts(seeds, batch, partial(_sampled, role, who, n, some, tick)) for some in again]
            spreads.append(dict(enumerate(map(judge.spread, apart))) if again else found.spread)
        if likely is not None:
            for role, who in {role: who for role, who, _ in plan}.items():
                held = in_batches(gather(data, judged, seed, 0, False), batch, cond != {})
                value = likelihood(who, held, seed, guidance=guidance, tick=tick, world=world)
                rows = [{**row, likely: value} if row["model"] == role else row for row in rows]
        no_floor = {*LIKELIHOODS, *ENDS, *(["diversity"] if groups else [])}
        no_floor |= set() if has_classes(known) else {"accuracy", *(["diversity"] if is_by_class else [])}
        floor = None
        if len(second) == len(first):
            also = [name for name in names if name not in no_floor]
            floor = judge.measure(gather(data, second, seed, 1, is_large), also)
        rows, floor = told(_with_diversity(names, plan, rows, spreads, floor), world)
    facts = {
        "shape": list(data.shape), "count": count, "seed": seed, "data": len(first), "ends": solved,
        "extractor": identity_of(extractor),
    }  # fmt: skip
    if learned is not None:
        facts["training"] = learned.count
    tell: Any = getattr(data, "captions", None) if cond is None else None
    captions = [] if tell is None else tell(first[torch.arange(len(judge.shown)) % len(first)])
    shown = {**samples, "data": judge.shown} if world.is_main else {}
    return Evaluation(rows, floor, facts, shown, captions)


def _with_diversity(
    names: Sequence[str],
    plan: Sequence[tuple[str, Any, int]],
    rows: list[dict[str, Any]],
    spreads: Sequence[dict[int, float]],
    floor: Measured | None,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The rows of the table, and that of the data, each spread over the teacher's at its largest number of steps."""
    values = {} if floor is None else dict(floor.values)
    if "diversity" in names:
        _, most = max((n, i) for i, (role, _, n) in enumerate(plan) if role == "teacher")
        rows = [{**row, "diversity": diversity(own, spreads[most])} for row, own in zip(rows, spreads, strict=True)]
        if floor is not None and floor.spread:
            values["diversity"] = diversity(floor.spread, spreads[most])
    return rows, {name: value for name, value in values.items() if value is not None}


def _sampled(
    role: str,
    model: FlowMap | VelocityField,
    steps: int,
    starts: Starts,
    tick: Callable[[float], None],
    rows: range,
) -> Batch:
    noise, generators, cond = starts.of(model, rows)
    with each_call(model, steps, tick, steps):
        x = sample(model, noise, steps, generator=generators, **cond)
    bad = int((~x.flatten(1).isfinite().all(1)).sum())
    if bad:
        raise ValueError(f"{bad} of {len(x)} samples of the {role} in {steps} steps are not finite: it has diverged")
    return Batch(x, cond)


def _ends(teacher: VelocityField, starts: Starts, tick: Callable[[float], None], rows: range) -> Batch:
    """Where the teacher's ODE takes the noise, on the CPU."""
    noise, _, cond = starts.of(teacher, rows)
    with each_call(teacher, 2 * _SOLVE, tick, 2 * _SOLVE):
        if isinstance(teacher, ExactField):
            ends = teacher.flow(noise, 0.0, 1.0, tolerance=1e-6)
        else:
            ends = sample(teacher, noise, _SOLVE, solver="midpoint", **cond)
    return Batch(ends.cpu())


def _as_data(data: Any, teacher: VelocityField | None) -> Data:
    if data is None and isinstance(teacher, ExactField):
        exact = deepcopy(teacher).cpu()  # data are drawn on the CPU, like all that is random
        return Toy(exact.data, exact.shape)
    if data is None:
        raise ValueError("evaluate needs data, to hold samples against: only an exact teacher brings its own")
    return of_one_shape(as_data(data))


@contextmanager
def _eval_mode(*modules: nn.Module | None) -> Iterator[None]:
    """All in eval mode, and afterwards each part in the mode that it was in: a run may still be training them."""
    modes = [(part, part.training) for module in modules if module is not None for part in module.modules()]
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
