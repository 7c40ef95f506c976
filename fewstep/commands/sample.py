"""`sample`: what a model draws."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from fewstep.commands.parser import Commands, add_command
from fewstep.commands.shared import (
    MODEL,
    add_device,
    add_guidance_scale,
    add_source,
    add_variant,
    numbers,
    open_model,
    size_of,
    with_flags,
)
from fewstep.commands.steered import add_steering, became, steered_by
from fewstep.common.console import progress_bar, say_next
from fewstep.common.errors import shown

_MOST = 10_000_000  # samples: what is known of each takes memory


def add(commands: Commands) -> None:
    p = add_command(
        commands,
        "sample",
        run,
        "draw samples",
        examples=[
            "sample runs/checkerboard --steps 2 --count 1000 --out samples.npy",
            'sample ./stable-diffusion --prompt "a cat" "a dog" --guidance-scale 7.5 --out cats-and-dogs.png',
        ],
        may_run_code=True,
    )
    p.add_argument("model", help=MODEL)
    text = "how many steps, diffusers' num_inference_steps (default: 2 for a flow map, 50 for a velocity field)"
    p.add_argument("--steps", type=int, metavar="N", help=text)
    p.add_argument("--count", type=int, metavar="N", help="how many (default: 64, or as many as prompts or seeds)")
    p.add_argument("--seed", type=int, metavar="N", help="sample i of a seed is always the same (default: 0)")
    p.add_argument("--first", type=int, default=0, metavar="I", help="go on with sample I of the seed (default: 0)")
    p.add_argument("--seeds", metavar="5,9,17", help="in the place of --seed and --count: sample 0 of each of these")
    p.add_argument("--out", type=Path, metavar="PATH", help="a .png grid, .npy, .npz, .txt, or a folder (goes on)")
    add_source(p)
    text = "classes by number or name, given to the samples in turn (default: all)"
    p.add_argument("--labels", metavar="3,cat", help=text)
    prompts = p.add_mutually_exclusive_group()
    text = "texts, given to the samples in turn, for a model of text; --prompt=-TEXT for one that begins with a dash"
    prompts.add_argument("--prompt", nargs="+", action="extend", metavar="TEXT", help=text)
    text = "sample i takes line i: of a text file, or of a .jsonl with text, seed and label (samples.jsonl is one)"
    prompts.add_argument("--prompts", metavar="FILE", help=text)
    text = "height and width in pixels, for a model that takes others"
    p.add_argument("--size", metavar="768x1024", help=text)
    text = "what stands beside the samples, in turn, for a model that takes an image: a picture, a folder of them, .npy"
    p.add_argument("--image", metavar="PATH", help=f"{text} (default: those of the run's data)")
    add_guidance_scale(p)
    p.add_argument("--latents", action="store_true", help="write the latents of a latent model, not their images")
    text = "re-noising between steps, 0 to 1 (default: the map's, mostly 0)"
    p.add_argument("--gamma", type=float, metavar="G", help=text)
    text = (
        "times of the steps: uniform (default), shifted, quadratic, gaussian(C) of data with that deviation, native "
        "(those of DDIM), or optimal (found once, and kept with a run)"
    )
    p.add_argument("--grid", default="uniform", metavar="NAME", help=text)
    p.add_argument("--solver", metavar="NAME", help="for a velocity field: euler (default), midpoint, heun, adaptive")
    text = "for a velocity field, noise on the way: a number, kappa (as in DDPM), sigma, linear, decreasing, or "
    text += "increasing-decreasing (default: none, an ODE); solvers with it: euler, heun, ancestral"
    p.add_argument("--eps", metavar="E", help=text)
    text = "with --eps, how the last step goes: tweedie (default), euler, mean, none"
    p.add_argument("--last-step", metavar="NAME", help=text)
    add_steering(p)
    p.add_argument("--teacher", action="store_true", help="sample the teacher of the run instead")
    p.add_argument("--batch", type=int, default=256, metavar="N", help="samples drawn at once, at most (default: 256)")
    text = "of the network: float32 (default), bf16, or fp16 on a GPU"
    p.add_argument("--dtype", default="float32", metavar="NAME", help=text)
    p.add_argument("--compile", action="store_true", help="compile the network (torch.compile), which takes a while")
    add_variant(p)
    add_device(p)


def run(args: argparse.Namespace) -> int:
    from contextlib import ExitStack
    from math import prod

    from fewstep.common.distributed import choose_device, environment, join
    from fewstep.common.reading import check_memory
    from fewstep.common.received import without_places
    from fewstep.flows.maps import FlowMap
    from fewstep.flows.sampling import count_calls
    from fewstep.flows.signature import shape_of, sized
    from fewstep.flows.spaces import Tokens
    from fewstep.generation.beside import images_for
    from fewstep.generation.drawing import draw_batches, labels_of, settled
    from fewstep.generation.images import check_out, claim, missing, picture_name, save_pictures, says, write
    from fewstep.generation.placement import place
    from fewstep.generation.sharing import gathered, shares
    from fewstep.latents.prompts import TEXT_CONDITIONS
    from fewstep.runs.datasets import given_by

    world = environment()
    device = choose_device(args.device, world)
    steered, how = steered_by(args)
    model, run = open_model(args)
    size = size_of(args.size) if args.size else None
    own = None if run is None else run.shape
    shape = (own or shape_of(model)) if size is None else sized(model, own, size)
    steps = args.steps if args.steps is not None else 2 if isinstance(model, FlowMap) else 50
    latents = None if args.latents else model.latents
    written = shape if latents is None else latents.image_shape_of(shape)
    is_drawn = (len(written) == 3 and written[0] in (1, 3)) or written == (2,)
    is_text = isinstance(model.space, Tokens)
    out = args.out or Path("samples.txt" if is_text else "samples.png" if is_drawn else "samples.npy")
    check_out(out, written, is_text)
    requests = _requests(args, model)
    rows = {"count": requests.count, "first": requests.first, "text": not requests.prompts}
    given = {} if run is None or args.image else given_by(run.recipe, model, **rows)
    given |= {"image": images_for(model, args.image, shape)} if args.image else {}
    requests = settled(model, requests, given)

    options = {"grid": args.grid, "gamma": args.gamma, "solver": args.solver, "guidance": args.guidance_scale}
    options |= {"eps": _eps(args.eps), "last_step": args.last_step}
    options = {name: value for name, value in options.items() if value is not None}
    is_folder = out.suffix == ""
    if not is_folder:
        wanted = 4 * requests.count * prod(written)
        check_memory(f"{requests.count:,} samples in one file", wanted, "fewer (--count), or a folder (--out samples)")
    facts = _facts(args, model, requests, given, shape, {"steps": steps, **options, **how}) if is_folder else {}
    told = {"size": size, "given": given, "decode": not args.latents, **options}
    if args.grid == "optimal":
        if options.get("eps"):
            raise ValueError(f"--eps {args.eps}: an optimal grid is that of the ODE; leave out one of --eps and --grid")
        told["grid"] = _optimal(args, model, run, requests, steps, shape, told, device, world.size == 1)
        facts |= {"grid": told["grid"].tolist()} if is_folder else {}
    model = place(model, device, args.dtype, args.compile)
    batches = shares(requests.count, args.batch if steered is None else max(1, args.batch // steered.particles), world)
    mine = batches[world.rank :: world.size]

    if is_folder:
        mine = [rows for rows in (missing(out, rows, requests.count) for rows in mine) if rows]
    drawn = draw_batches(model, requests, mine, steps, shape=shape, steered=steered, **told)
    if is_folder:
        claim(out, facts, requests)
    parts, done, total = [], 0, sum(map(len, mine))
    with ExitStack() as stack:
        stack.enter_context(join(world, device))
        calls = stack.enter_context(count_calls(model))
        progress = stack.enter_context(progress_bar("samples", not (world.is_main and sys.stderr.isatty())))
        for rows, samples in drawn:
            if is_folder:
                name = without_places(args.model)  # an image goes to others
                texts = [{"model": name, **says(requests, i), "steps": steps, **options, **how} for i in rows]
                save_pictures(samples, [out / picture_name(i, requests.count) for i in rows], texts)
            else:
                parts.append(samples)
            done += len(rows)
            if progress:
                progress(done, total)
        new, called = map(int, world.sum([total, calls.rows]))
        least, left, populations = world.sum([0.0, 0.0, 0] if steered is None else [*steered.counts])
        whole = None if is_folder else gathered(parts, batches, world)
    if not world.is_main:
        return 0
    if whole is not None:
        # Not those of text, many times larger than the samples.
        kept = given.keys() - (TEXT_CONDITIONS if model.text is not None else ())
        turns = {name: given[name][[i % len(given[name]) for i in range(requests.count)]] for name in sorted(kept)}
        write(whole, {**labels_of(requests), **turns}, out, model.space)
    there = f" ({requests.count - new} were there)" if new < requests.count else ""
    print(f"{out}: {requests.count} samples{there}" + (f", {called / new:g} network calls each" if new else ""))
    if steered is not None and populations:
        print(became(steered.particles, least / populations, left / populations))
    if run is None or args.teacher:
        more = {"--steps": str(2 * steps), "--out": f"samples-{2 * steps}{out.suffix}"}
        say_next([shlex.join(["fewstep", *with_flags(args.argv, more)])])
    else:
        export = ["export", args.model, f"{Path(args.model).name}-export"]
        say_next([shlex.join(["fewstep", *words]) for words in (["evaluate", args.model], export)])
    return 0


def _eps(text: str | None) -> str | float | None:
    """A strength of noise: a number, or the name of one."""
    try:
        return text if text is None else float(text)
    except ValueError:
        return text


def _optimal(
    args: argparse.Namespace,
    model: Any,
    run: Any,
    requests: Any,
    steps: int,
    shape: tuple[int, ...],
    told: dict[str, Any],
    device: Any,
    alone: bool,
) -> Any:
    """The times of ``--grid optimal``: those kept in the run, or found now, as the network computes them in float32."""
    from fewstep.flows.fields import VelocityField
    from fewstep.flows.identity import identity
    from fewstep.runs.loading import teacher_of
    from fewstep.runs.objective import follows_teacher
    from fewstep.runs.step_grids import found_with, grid_for

    is_field = args.teacher or isinstance(model, VelocityField)
    teacher = None if run is None or is_field or not follows_teacher(run.recipe) else teacher_of(run.recipe)
    by = "itself" if teacher is None else identity(teacher)
    solver, gamma, guidance = args.solver or "euler", args.gamma, args.guidance_scale
    facts = found_with(model, identity(model), solver=solver, gamma=gamma, guidance=guidance, shape=shape, by=by)
    model, reference = model.to(device), None if teacher is None else teacher.to(device)
    return grid_for(
        model,
        reference or model,
        requests,
        steps,
        facts,
        folder=None if run is None else Path(args.model).expanduser(),
        alone=alone,
        solver=solver,
        gamma=gamma,
        batch=args.batch,
        shape=shape,
        size=told["size"],
        given=told["given"],
        guidance=guidance,
    )


def _requests(args: argparse.Namespace, model: Any) -> Any:
    """Which samples are asked for."""
    from fewstep.generation.requests import Requests, class_names, class_numbers, class_words, is_number, read_lines

    seeds = numbers("--seeds", args.seeds) if args.seeds else []
    if seeds and (args.seed is not None or args.first or args.count is not None):
        raise ValueError("--seeds draws the first sample of each: leave out --seed, --first and --count")
    first, prompts, noise = args.first, args.prompt or [], [(seed, 0) for seed in seeds]
    labels = class_words("--labels", args.labels)
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
    return Requests(count, args.seed or 0, first, prompts, class_numbers(labels, names), noise)


def _facts(
    args: argparse.Namespace, model: Any, requests: Any, given: dict[str, Any], shape: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """What all images of a folder are drawn with: what would make others of them."""
    import hashlib

    from fewstep.flows.identity import identity
    from fewstep.latents.encoders import text_identity, vae_identity

    # What makes images of latents, and conditions of prompts, where that is what is done.
    vae = None if model.latents is None or args.latents else vae_identity(model.latents)
    text = None if model.text is None or not requests.prompts else text_identity(model.text)
    digest = hashlib.sha256()
    for name, value in sorted(given.items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return {
        "format": 1, "model": args.model, "weights": identity(model), "vae": vae, "text": text, "shape": list(shape),
        "dtype": args.dtype, "latents": args.latents,
        **options, "count": requests.count, "seed": requests.seed, "first": requests.first,
        **({"source": args.source} if args.source else {}),
        "seeds, prompts and labels": requests.digest(), "conditions": digest.hexdigest()[:16] if given else None,
    }  # fmt: skip
