"""`sample` and `reflow`: what a model draws."""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from fewstep.commands.words import numbers
from fewstep.common.console import progress_bar, say_next
from fewstep.common.errors import shown

_MOST = 10_000_000  # samples: what is known of each takes memory


def run_sample(args: argparse.Namespace, _: dict[str, str]) -> int:
    from contextlib import ExitStack
    from math import prod

    from fewstep.common.distributed import choose_device, environment, join
    from fewstep.common.reading import check_memory
    from fewstep.common.received import without_places
    from fewstep.flows.maps import FlowMap
    from fewstep.flows.sampling import count_calls
    from fewstep.flows.signature import shape_of, sized
    from fewstep.generation.drawing import draw_batches, labels_of, settled
    from fewstep.generation.images import check_out, claim, missing, picture_name, save_pictures, says, write
    from fewstep.generation.placement import place
    from fewstep.generation.requests import prompt_flags
    from fewstep.generation.sharing import gathered, shares
    from fewstep.latents.prompts import TEXT_CONDITIONS
    from fewstep.runs.datasets import given_by

    world = environment()
    device = choose_device(args.device, world)
    model, run = open_model(args)
    size = _size(args.size) if args.size else None
    own = None if run is None else run.shape
    shape = (own or shape_of(model)) if size is None else sized(model, own, size)
    steps = args.steps if args.steps is not None else 2 if isinstance(model, FlowMap) else 50
    latents = None if args.latents else model.latents
    written = shape if latents is None else latents.image_shape_of(shape)
    is_drawn = (len(written) == 3 and written[0] in (1, 3)) or written == (2,)
    out = args.out or Path("samples.png" if is_drawn else "samples.npy")
    check_out(out, written)
    asked = _asked(args, model)
    given = {} if run is None else given_by(run.recipe, model, asked.count, asked.first, text=not asked.prompts)
    asked = settled(model, asked, given)

    options = {"grid": args.grid, "gamma": args.gamma, "solver": args.solver, "guidance": args.guidance}
    options = {name: value for name, value in options.items() if value is not None}
    is_folder = out.suffix == ""
    if not is_folder:
        wanted = 4 * asked.count * prod(written)
        check_memory(f"{asked.count:,} samples in one file", wanted, "fewer (--count), or a folder (--out samples)")
    facts = _facts(args, model, asked, given, shape, {"steps": steps, **options}) if is_folder else {}
    model = place(model, device, args.dtype, args.compile)
    batches = shares(asked.count, args.batch, world)
    mine = batches[world.rank :: world.size]

    if is_folder:
        mine = [rows for rows in (missing(out, rows, asked.count) for rows in mine) if rows]
    told = {"size": size, "given": given, "decode": not args.latents, **options}
    drawn = draw_batches(model, asked, mine, steps, shape=shape, **told)
    if is_folder:
        claim(out, facts, asked)
    parts, done, total = [], 0, sum(map(len, mine))
    with ExitStack() as stack:
        stack.enter_context(join(world, device))
        calls = stack.enter_context(count_calls(model))
        progress = stack.enter_context(progress_bar("samples", not (world.is_main and sys.stderr.isatty())))
        for rows, samples in drawn:
            if is_folder:
                name = without_places(args.model)  # a picture goes to others
                texts = [{"model": name, **says(asked, i), "steps": steps, **options} for i in rows]
                save_pictures(samples, [out / picture_name(i, asked.count) for i in rows], texts)
            else:
                parts.append(samples)
            done += len(rows)
            if progress:
                progress(done, total)
        new, called = map(int, world.sum([total, calls.rows]))
        whole = None if is_folder else gathered(parts, batches, world)
    if not world.is_main:
        return 0
    if whole is not None:
        # Not those of text, many times larger than the samples.
        kept = given.keys() - (TEXT_CONDITIONS if model.text is not None else ())
        turns = {name: given[name][[i % len(given[name]) for i in range(asked.count)]] for name in sorted(kept)}
        write(whole, {**labels_of(asked), **turns}, out)
    there = f" ({asked.count - new} were there)" if new < asked.count else ""
    print(f"{out}: {asked.count} samples{there}" + (f", {called / new:g} network calls each" if new else ""))
    if run is None or args.teacher:
        text = ["--prompts", args.prompts] if args.prompts else prompt_flags(args.prompt or [])
        more = [
            "--steps",
            str(2 * steps),
            *(["--trust"] if args.trust else []),
            "--out",
            f"samples-{2 * steps}{out.suffix}",
        ]
        say_next([shlex.join(["fewstep", "sample", args.model, *more, *text])])
    else:
        export = ["export", args.model, f"{Path(args.model).name}-export"]
        say_next([shlex.join(["fewstep", *words]) for words in (["evaluate", args.model], export)])
    return 0


def _asked(args: argparse.Namespace, model: Any) -> Any:
    """Which samples are asked for."""
    from fewstep.generation.requests import Asked, class_names, class_numbers, is_number, read_lines

    seeds = numbers("--seeds", args.seeds) if args.seeds else []
    if seeds and (args.seed is not None or args.first or args.count is not None):
        raise ValueError("--seeds draws the first sample of each: leave out --seed, --first and --count")
    first, prompts, labels, noise = args.first, args.prompt or [], [], [(seed, 0) for seed in seeds]
    labels = [] if args.labels is None else [word.strip() for word in args.labels.split(",")]
    if not all(labels):
        raise ValueError(f"--labels {args.labels}: classes with commas between are needed, such as 3,cat")
    known = len(seeds) or None
    if args.prompts:
        lines = read_lines(args.prompts)
        known = max(len(lines.prompts), len(lines.labels), len(lines.noise))
        if lines.labels and labels:
            raise ValueError(f"--labels {args.labels}: {args.prompts} has labels of its own")
        if lines.noise and seeds:
            raise ValueError(f"--seeds {args.seeds}: {args.prompts} has seeds of its own")
        if seeds and len(seeds) != known:
            raise ValueError(f"{len(seeds)} seeds and {known} prompts in {args.prompts}: sample i takes prompt i")
        if first + (args.count or 1) > known:
            raise ValueError(
                f"--count {args.count or 1}{f' --first {first}' if first else ''}: {args.prompts} has {known} prompts, "
                "and sample i takes prompt i. --prompt TEXT ... gives texts in turn"
            )
        prompts, labels, noise = lines.prompts, lines.labels or labels, lines.noise or noise
    count = args.count if args.count is not None else known - first if known else 64
    if count < 1 or args.batch < 1 or first < 0:
        raise ValueError(f"count is {count}, batch {args.batch} and first {first}: at least one sample, from 0 on")
    if count > _MOST:
        raise ValueError(f"--count {shown(count)}: {_MOST:,} samples at most, --first goes on after them")
    has_names = any(isinstance(word, str) and not is_number(word) for word in labels)
    names = class_names(model) if has_names else {}
    return Asked(count, args.seed or 0, first, prompts, class_numbers(labels, names), noise)


def _facts(
    args: argparse.Namespace, model: Any, asked: Any, given: dict[str, Any], shape: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """What all pictures of a folder are drawn with: what would make others of them."""
    import hashlib

    from fewstep.flows.identity import identity
    from fewstep.latents.encoders import text_identity, vae_identity

    # What makes pictures of latents, and conditions of prompts, where that is what is done.
    vae = None if model.latents is None or args.latents else vae_identity(model.latents)
    text = None if model.text is None or not asked.prompts else text_identity(model.text)
    digest = hashlib.sha256()
    for name, value in sorted(given.items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return {
        "format": 1, "model": args.model, "weights": identity(model), "vae": vae, "text": text, "shape": list(shape),
        "dtype": args.dtype, "latents": args.latents,
        **options, "count": asked.count, "seed": asked.seed, "first": asked.first,
        "seeds, prompts and labels": asked.digest(), "conditions": digest.hexdigest()[:16] if given else None,
    }  # fmt: skip


def _size(text: str) -> tuple[int, int]:
    """Height and width, of 768 or 768x1024."""
    from fewstep.data.decode import LARGEST

    found = re.fullmatch(r"([0-9]+)(?:x([0-9]+))?", text.lower())
    if found is None:
        raise ValueError(f"--size {shown(text)}: pixels are needed, such as 768, or 768x1024 for height and width")
    size = int(found[1][:9]), int((found[2] or found[1])[:9])
    if max(size) > LARGEST:
        raise ValueError(f"--size {shown(text)}: {LARGEST} pixels at most")
    return size


def run_reflow(args: argparse.Namespace, _: dict[str, str]) -> int:
    from fewstep.common.distributed import environment
    from fewstep.flows.fields import Guided, NetworkField, unguided
    from fewstep.flows.maps import FlowMap
    from fewstep.flows.signature import image_channels, shape_of, takes
    from fewstep.generation.reflow import make_pairs
    from fewstep.generation.requests import read_lines
    from fewstep.latents.encoders import kept_null

    model, run = open_model(args)
    shape = shape_of(model) if run is None else run.shape
    if image_channels(model):
        raise ValueError(
            f"{args.model} takes an image beside the state, and pairs are drawn of classes alone: draw its noise and "
            "samples in Python, fewstep.sample(model, noise, image=...), and train on arrays"
        )
    again, is_main = shlex.join(["fewstep", *args.argv]), environment().is_main
    is_map, guidance = isinstance(model, FlowMap), args.guidance
    if guidance is not None and not is_map and not isinstance(model, Guided) and not takes(model, "guidance"):
        if model.text is None:
            raise ValueError(f"--guidance {guidance:g}: {args.model} is told no strength of guidance, and has no text")
        model, guidance = Guided(model, guidance, null=kept_null(model.text)), None
    with progress_bar("pairs", quiet=not (is_main and sys.stderr.isatty())) as progress:
        missing = make_pairs(
            model,
            args.out,
            args.count,
            steps=args.steps or ((1 if model.gamma else 2) if is_map else 50),
            solver=args.solver,
            shape=shape,
            seed=args.seed,
            labels=numbers("--labels", args.labels) if args.labels else None,
            prompts=read_lines(args.prompts).prompts if args.prompts else None,
            guidance=guidance,
            batch=args.batch,
            shard=args.shard,
            device=args.device,
            command=again,
            progress=progress,
        )
    if not is_main:
        return 0
    if missing:
        print(f"{args.out}: {missing} shards are still missing, which other processes draw")
        say_next([again])
        return 0
    print(f"{args.out}: {args.count} pairs of noise and data")
    train = ["--objective", "FlowMatching", "--out", f"{args.out}-trained"]
    if isinstance(unguided(model), NetworkField) and not args.teacher:
        # Starts from the model's own weights, and is judged by its trajectories.
        say_next([shlex.join(["fewstep", "distill", "--teacher", args.model, "--data", str(args.out), *train])])
    else:
        recipe = args.model if run else "checkerboard-reflow" if len(shape) == 1 else "photos-teacher"
        # As a mapping, it takes the place of the options of the recipe's own data too.
        data = json.dumps({"name": str(args.out)})
        say_next([shlex.join(["fewstep", "train", recipe, "--data", data, *train])])
    return 0


def open_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model that is asked for (with --teacher, the teacher of the run), and its run if it is one."""
    from fewstep.runs.opening import find_model, make_teacher, open_run
    from fewstep.training.folder import is_run

    run = open_run(args.model) if is_run(Path(args.model).expanduser()) else None
    if args.teacher and (run is None or run.recipe.teacher is None):
        raise ValueError(f"--teacher: {args.model} is no run that has a teacher")
    if args.variant and run is not None:
        raise ValueError(f"--variant {args.variant}: {args.model} is a run; its recipe says that of its teacher")
    model = find_model(args.model, {"variant": args.variant} if args.variant else None) if run is None else run.model
    if args.teacher and run is not None and run.recipe.teacher is not None:
        model = make_teacher(run.recipe.teacher)
        model.moments = run.model.moments  # it knows the data as the run does
    return model, run
