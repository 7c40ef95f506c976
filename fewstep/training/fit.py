"""``fit``: the training loop, on one process or many, that can be killed at any instant and goes on.

Every random number of step n comes from (seed, n): rows, noise, times, dropout. So a checkpoint needs no random state,
and a run that was killed and started again ends with the bits of one that never was (on the CPU, bounded by steps).
"""

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fewstep.common import console, distributed
from fewstep.common.distributed import World
from fewstep.common.locks import owned
from fewstep.data.batch import Data
from fewstep.data.buckets import buckets_of
from fewstep.data.given import as_data
from fewstep.objectives.base import Objective
from fewstep.objectives.finishing import name_of
from fewstep.training import folder, interrupt, trackers
from fewstep.training.batches import Batches, few_rows
from fewstep.training.computing import compile_networks, half_precision, threads_for, use_checkpoints
from fewstep.training.eight_bits import check_eight_bits, is_eight_bit
from fewstep.training.ema import Model
from fewstep.training.fingerprint import flat
from fewstep.training.floors import Floors
from fewstep.training.leaving import leave
from fewstep.training.logbook import Logbook
from fewstep.training.meter import Meter
from fewstep.training.placing import placed
from fewstep.training.run import Callback, Result, Run
from fewstep.training.schedules import schedule_factor
from fewstep.training.sharding import Sharding, check_sharding
from fewstep.training.shares import default_chunk
from fewstep.training.step import (
    adamw,
    check_scale,
    checkpoints_followed,
    norm_names,
    players_of,
    seed_dropout,
    syncing,
    update,
)


def fit(
    student: Model,
    objective: Objective,
    data: Any,
    steps: int | None = None,
    max_seconds: float | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    *,
    batch: int = 256,
    chunk: int | None = None,
    accumulate: int = 1,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    optimizer: str | None = None,
    schedule: str = "cosine",
    warmup: int = 0,
    clip: float | None = 1.0,
    ema: float | None = 0.999,
    ema_warmup: bool = True,
    precision: str = "float32",
    compile: bool = False,
    gradient_checkpointing: bool = False,
    shard: str | None = None,
    offload: bool = False,
    device: torch.device | str | None = None,
    checkpoint_every: int = 1000,
    checkpoint_minutes: float | None = 10.0,
    keep: int = 2,
    log_every: int = 50,
    callbacks: Sequence[Callback] = (),
    track: Sequence[str] = (),
    fingerprint: dict[str, Any] | None = None,
    resume: bool = True,
    quiet: bool = False,
) -> Result[Model]:
    """Train ``student`` with ``objective`` on ``data``, in place.

    >>> result = fit(student, ITVM(teacher), data, steps=20_000, out="runs/fast")
    >>> images = sample(result.ema, torch.randn(64, 3, 32, 32), steps=2)

    Under torchrun, ``accelerate launch`` or SLURM (with MASTER_ADDR set) this trains on all processes, with the rows,
    noise and losses of one. With ``out`` it checkpoints, and the same call goes on from the last; that folder is a
    run, which ``fewstep.load``, ``sample``, ``evaluate`` and ``export`` take. A line says what these lack, if anything.

    Args:
        student, objective: see ``fewstep.objectives.base``; both are moved to the device.
        data: what ``fewstep.load_data`` gives, or any other ``Data``; a tensor or numpy array (N, ...) of rows; a
            ``TensorDataset``, a map-style ``Dataset`` or its ``DataLoader``, of which the batches are not used. Of
            ``fewstep.data.Buckets``, each step sees rows of one shape.
        steps, max_seconds: where to stop, at least one of them; progress is the larger of the two shares. A run
            bounded by time depends on the clock and cannot be repeated bit for bit. The time counts everything (data,
            callbacks, checkpoints, earlier parts of a resumed run) but what comes before the first step, as samples
            of a teacher.
        seed: decides every random number of the training (not the initial weights).
        out: the run folder; without it nothing is written.
        batch: rows of one update, over all processes and micro-batches.
        chunk: rows that share a generator; the default is the largest divisor of ``batch`` up to 64. Whole chunks are
            shared out, so batch must be a multiple of chunk x processes x accumulate.
        accumulate: micro-batches per update and process; saves memory, changes nothing else.
        lr, betas, weight_decay: of AdamW, one for each player of ``objective.parameter_groups``.
        optimizer: ``adamw`` (or None), or ``adamw8bit``: moments in 8 bits of weights of 4096 numbers or more.
        schedule, warmup: see ``fewstep.training.schedules``; a longer continuation (``steps``) stretches the cosine.
        clip: the largest gradient norm of a player, None for no limit.
        ema, ema_warmup: decay of the averaged weights, None for none, and whether it rises from 0.1 as (1 + n) /
            (10 + n) until it gets there. Apart from the copy that the objective may want (``objective.ema``).
        precision: float32, or the autocast type bf16 (GPU, CPU) or fp16 (GPU, with a gradient scaler). Weights,
            averages and times stay float32.
        compile: ``torch.compile`` for ``student.network`` (and of the target's).
        gradient_checkpointing: a student of a diffusers model keeps few of its activations and computes the others
            again on the way back: less memory for about a third more time, and the same gradients.
        shard: ``fsdp2`` shares out the networks of student, teacher and averages over the processes, so that each keeps
            a part of every block, and of its gradients and moments (torch's ``fully_shard``). The same rows and, up to
            the order of sums, the same numbers as without. Callbacks are then called in every process, since all have
            to call a sharded network. At the end the whole student and average are on the CPU of each.
        offload: keep these parts on the CPU, where the optimizer then runs too; a block comes to the GPU for its call.
        device: the default is the process's GPU if there is one, else the CPU.
        checkpoint_every, checkpoint_minutes, keep: steps between checkpoints, minutes after which there is one too
            (None for no limit), and how many are kept.
        log_every: steps between lines of ``metrics.jsonl``, and on a GPU between checks that all is finite.
        callbacks: called after each step with the ``Run``, in the main process alone (in all of them where it shards).
            They see to their own rhythm:

            >>> def grid(run: Run) -> None:
            ...     if run.step % 1000 == 0:
            ...         save_grid(run.out, sample(run.ema, noise, steps=4))
            ...         run.log({"rmse": rmse(run.ema)})

        track: any of ``tensorboard``, ``trackio``, ``wandb``.
        fingerprint: the resolved recipe, of a run whose ``recipe.yaml`` was written before. A folder whose run had
            another one, or other arguments of ``fit``, is refused; the length of the training and what only shows or
            places it may differ (``MAY_DIFFER``).
        resume: False throws away the run in ``out`` and starts again.
        quiet: no progress bar or lines.

    Raises:
        ValueError: arguments that cannot be, a run folder of something else; before anything is computed.
        FileNotFoundError: the checkpoints of the run in ``out`` are gone.
        BusyError: another process trains in ``out``. WriteError: a disk that is full or cannot be written.
        TrainingError: a damaged checkpoint, a loss that is not finite.
    """
    # Everything that can be refused is refused here, before a file is touched or anything computed.
    _check_positive(
        steps=steps, max_seconds=max_seconds, batch=batch, chunk=chunk, accumulate=accumulate, lr=lr, clip=clip,
        checkpoint_every=checkpoint_every, checkpoint_minutes=checkpoint_minutes, keep=keep, log_every=log_every,
    )  # fmt: skip
    if steps is None and max_seconds is None:
        raise ValueError("fit needs steps, max_seconds or both: when is the training done?")
    schedule_factor(schedule, 0.0)
    objective.check_student(student)
    if compile and not isinstance(getattr(student, "network", None), nn.Module):
        raise ValueError(f"compile=True compiles student.network, and {type(student).__name__} has none")
    if gradient_checkpointing:
        use_checkpoints(student)
    check_sharding(shard, offload, student, objective, precision=precision, compile=compile)
    if eight_bit := is_eight_bit(optimizer, shard):
        check_eight_bits(student, objective)
    trackers.check(track)
    world = distributed.environment()
    device = distributed.choose_device(device, world)
    half = half_precision(precision, device)
    data = as_data(data)
    objective.check_data(data, student)
    chunk = chunk or default_chunk(batch)
    batches = Batches(data, batch, chunk, seed, accumulate, world.rank, world.size)
    out = None if out is None else Path(out)
    settings = {
        "seed": seed, "batch": batch, "chunk": chunk, "accumulate": accumulate, "lr": lr, "betas": betas,
        "weight_decay": weight_decay, "schedule": schedule, "warmup": warmup, "clip": clip, "ema": ema,
        "ema_warmup": ema_warmup, "precision": precision, "optimizer": "adamw8bit" if eight_bit else None,
    }  # fmt: skip
    if world.is_main and not quiet:
        for line in few_rows(data, batch):
            console.say(f"note: {line}")
    identity = _identity(settings, student, objective, data) | flat(fingerprint or {})
    if out is not None:
        folder.open_run(out, identity, resume)

    with interrupt.catch() as signal, ExitStack() as stack:
        if out is not None and world.is_main:
            stack.enter_context(owned(out, "trained"))
            stack.enter_context(folder.unless_refused(out))
        with interrupt.let_through():  # others may be waited for
            stack.enter_context(distributed.join(world, device, group=shard is not None))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        world.barrier()  # from here on nobody else changes the folder
        found = None if out is None else folder.open_run(out, identity, resume)
        world.barrier()  # all have looked at it before the main process changes it
        if out is not None and world.is_main:
            folder.prepare(out, identity, resume)
            if fingerprint is None:  # no recipe says what the run is made of
                length = {"steps": steps, "max_seconds": max_seconds}
                of_run = {name: value for name, value in settings.items() if name != "seed"}
                for line in leave(out, student, objective, data, {**length, **of_run}, seed):
                    console.say(f"note: {line}")

        sharding = Sharding(world, device, half, offload) if shard else None
        if sharding is not None:
            stack.enter_context(distributed.together())
        here = placed(student, objective, world, device, ema=ema, ema_warmup=ema_warmup, sharding=sharding)
        step, model = here.step, here.model
        players = players_of(objective, student)
        run = Run(
            student,
            objective,
            players,
            adamw(players, device, lr=lr, betas=betas, weight_decay=weight_decay, eight_bit=eight_bit),
            torch.amp.GradScaler("cuda", enabled=half is torch.float16),
            average=here.average,
            slow=here.slow,
            meter=Meter(may_overflow=half is torch.float16),
            out=out,
            fingerprint=identity,
            world=world,
            still=here.still,
        )
        if found is not None:
            run.restore(found)
        world.check_same(run.step, out)
        run.progress = _progress(run, steps, max_seconds)
        if run.progress < 1.0:
            with interrupt.let_through():  # the first row may draw samples of a teacher: no time of the training
                batches.micro(run.step, 0)
        if device.type == "cpu":
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            measured = torch.get_num_threads() if sharding else threads_for(run, step, batches, half)
            run.threads = world.from_main(measured)
            torch.set_num_threads(run.threads)
            # Killed before its first checkpoint, it begins with as many again.
            if out is not None and world.is_main and folder.threads_of(out) != run.threads:
                folder.begin(out, identity, run.threads)
        if compile:
            compile_networks(student, run.target)
        saved, saved_at, started = run.step, run.seconds, time.perf_counter() - run.seconds
        floors = Floors(players, run.step)
        book = stack.enter_context(Logbook(run, steps, track, world.is_main, quiet))

        while True:
            run.seconds, asked = world.agree(time.perf_counter() - started, signal.asked)
            run.progress = _progress(run, steps, max_seconds)
            if asked or run.progress >= 1.0:
                break

            seed_dropout(device, seed, run.step, world.rank)
            if sharding is not None:
                sharding.sync_buffers()
            for index in range(accumulate):
                rows, noise = batches.micro(run.step, index)
                with syncing(model, is_last=index == accumulate - 1), checkpoints_followed(objective):
                    # Without the cache: a goal made without grad would leave its casts of the weights, in older torch.
                    with torch.autocast(device.type, half, enabled=half is not None, cache_enabled=False):
                        loss, numbers, times = model(rows.to(device), noise, run.target, run.progress, run.step)
                    run.scaler.scale(loss / accumulate).backward()
                run.meter.add(run.step + 1, numbers, times)
            if sharding is not None:
                sharding.average_gradients()
                sharding.forget_calls()
            rate = lr * schedule_factor(schedule, run.progress, run.step, warmup)
            norms = update(run.players, run.optimizers, run.scaler, rate, clip)
            run.meter.add(run.step + 1, norm_names(norms, run.players))
            if next(iter(run.players)) in norms:  # the averages follow the student alone, where it moves
                for copy in run.copies:
                    copy.update(run.step)
            run.step += 1

            is_logged = run.step % log_every == 0 or run.step == steps
            if is_logged or device.type == "cpu":  # reading makes a GPU wait
                run.meter.read()
            if is_logged:
                check_scale(run.scaler, run.step)
                run.losses = run.meter.means(world)
                speed = book.speed(run)
                run.log({**run.losses, "lr": rate, "steps_per_second": speed, "rows_per_second": speed * batch})
                run.log({"seconds": run.seconds})
                if world.is_main:
                    floors.see(run.step, run.losses)
            if world.is_main or sharding is not None:
                for callback in callbacks:
                    callback(run)
                if not student.training:  # a callback that sampled from it
                    student.train()
            if world.is_main:
                book.write(run, _progress(run, steps, max_seconds))
            # Of the main process's clock, as it was when all began this step: all see the same.
            is_time = checkpoint_minutes is not None and run.seconds - saved_at >= 60 * checkpoint_minutes
            if run.step % checkpoint_every == 0 or is_time:
                saved, saved_at = _save(run, book, world, keep), run.seconds

        if run.step > saved:
            _save(run, book, world, keep)
        stopped = "interrupted" if run.progress < 1.0 else "done" if steps and run.step >= steps else "time"
        losses = run.losses or run.meter.means(world)
        book.end(run, stopped)
        if sharding is not None:
            sharding.put_back(student, run.ema, objective)
    # The average is a copy of the student.
    return Result(student, cast(Model, run.ema), run.step, run.seconds, run.step / run.seconds, losses, out, stopped)


def _save(run: Run, book: Logbook, world: World, keep: int) -> int:
    """A checkpoint by the main process, once every number of every process is known to be finite; the step."""
    run.meter.read()
    run.meter.share(world)
    if world.is_main:
        book.sync()
    run.save(keep)
    return run.step


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be more than 0, got {value}")


def _identity(settings: dict[str, Any], student: nn.Module, objective: Objective, data: Data) -> dict[str, Any]:
    """What makes a run this run and no other, as far as ``fit`` can see it."""
    return flat(
        {
            "training": settings,
            "objective_class": name_of(objective),
            "student_class": type(student).__name__,
            "student_parameters": sum(p.numel() for p in student.parameters()),
            "data_shape": list(data.shape),
            "data_size": data.size,
            "data_buckets": [[*bucket.shape, bucket.count] for bucket in buckets_of(data)] or None,
            "source_size": getattr(getattr(data, "source_data", None), "size", None),
            "data_classes": list(getattr(data, "classes", ())) or None,
            "data_moments": getattr(data, "moments", None),
        }
    )


def _progress(run: Run, steps: int | None, max_seconds: float | None) -> float:
    """How much of the training is done, by steps or by time, whichever is more."""
    return max(run.step / steps if steps else 0.0, run.seconds / max_seconds if max_seconds else 0.0)
