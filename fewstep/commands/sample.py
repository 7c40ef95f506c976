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
    add_engine,
    add_guidance_scale,
    add_source,
    add_variant,
    with_flags,
)
from fewstep.commands.steered import add_steering, became
from fewstep.common.console import adding, progress_bar, say_next


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
    p.add_argument("--out", type=Path, metavar="PATH", help="a .png grid, .npy, .npz, .txt, .wav, or a folder")
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
    add_guidance_scale(p, experts=True)
    p.add_argument("--latents", action="store_true", help="write the latents of a latent model, not their images")
    text = "re-noising between steps, 0 to 1 (default: the map's, mostly 0)"
    p.add_argument("--gamma", type=float, metavar="G", help=text)
    text = (
        "times of the steps: uniform (default; of a map that was trained at native times, native), shifted, quadratic, "
        "gaussian(C) of data with that deviation, native (those of the model's pipeline), or optimal (found once, and "
        "kept with a run)"
    )
    p.add_argument("--grid", metavar="NAME", help=text)
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
    add_engine(p)
    add_variant(p)
    add_device(p)


def run(args: argparse.Namespace) -> int:
    from fewstep.commands.drawn import prepared
    from fewstep.common.distributed import choose_device, environment
    from fewstep.common.on_ray import check_engine
    from fewstep.generation.drawing import labels_of
    from fewstep.generation.images import write
    from fewstep.latents.prompts import TEXT_CONDITIONS

    check_engine(args.engine, args.workers)
    world = environment()
    device = choose_device("cpu" if args.engine == "ray" else args.device, world)
    work = prepared(args, device, alone=world.size == 1)
    is_quiet = not (world.is_main and sys.stderr.isatty())
    with progress_bar("samples", is_quiet) as progress:
        draw = _by_workers if args.engine == "ray" else _by_processes
        new, called, whole, (least, left, populations) = draw(work, world, device, progress or (lambda *_: None))
    if not world.is_main:
        return 0
    given = work.told["given"]
    if whole is not None:
        # Not those of text, many times larger than the samples.
        kept = given.keys() - (TEXT_CONDITIONS if work.model.text is not None else ())
        turns = {name: given[name][[i % len(given[name]) for i in range(work.requests.count)]] for name in sorted(kept)}
        write(whole, {**labels_of(work.requests), **turns}, work.out, work.model.space, work.rate)
    there = f" ({work.requests.count - new} were there)" if new < work.requests.count else ""
    print(
        f"{work.out}: {work.requests.count} samples{there}" + (f", {called / new:g} network calls each" if new else "")
    )
    if work.steered is not None and populations:
        print(became(work.steered.particles, least / populations, left / populations))
    if work.run is None or args.teacher:
        more = {"--steps": str(2 * work.steps), "--out": f"samples-{2 * work.steps}{work.out.suffix}"}
        say_next([shlex.join(["fewstep", *with_flags(args.argv, more)])])
    else:
        export = ["export", args.model, f"{Path(args.model).name}-export"]
        say_next([shlex.join(["fewstep", *words]) for words in (["evaluate", args.model], export)])
    return 0


def _by_processes(work: Any, world: Any, device: Any, progress: Any) -> tuple[int, int, Any, list[float]]:
    """How many samples are new, the calls of the network for them, all samples where they are for one file, and what
    became of populations: drawn by this process and those that were started with it."""
    from fewstep.common.distributed import join
    from fewstep.flows.calls import count_calls, each_call
    from fewstep.flows.solvers import CALLS
    from fewstep.generation.sharing import gathered

    work.place(device)
    batches = work.batches(world)
    mine = work.left(batches[world.rank :: world.size])
    drawn = work.draw(mine)
    work.claim()
    parts, total = [], sum(map(len, mine))
    tick, expected = adding(progress, total), work.steps * CALLS.get(work.options.get("solver", "euler"), 1)
    with join(world, device), count_calls(work.model) as calls:
        for rows in mine:
            with each_call(work.model, expected, tick, len(rows)):
                parts.append(next(drawn)[1])
        new, called = map(int, world.sum([total, calls.rows]))
        became_of = world.sum(work.counts)
        return new, called, None if work.is_folder else gathered(parts, batches, world), became_of


def _by_workers(work: Any, world: Any, device: Any, progress: Any) -> tuple[int, int, Any, list[float]]:
    """As :func:`_by_processes`, by the workers of a Ray cluster: each batch is that of one process."""
    from functools import partial

    import torch

    from fewstep.commands.drawn import share_maker
    from fewstep.common.on_ray import on_ray
    from fewstep.generation.images import missing

    args = work.args
    batches = work.left(work.batches(world))
    work.draw([])  # which refuses what cannot be
    work.claim()
    grid = work.told["grid"] if args.grid == "optimal" else None
    parts, called, counts, done, total = {}, 0, [0.0, 0.0, 0.0], 0, sum(map(len, batches))
    on_cpu = torch.device(args.device or "cuda").type == "cpu"
    for rows, samples, calls, more in on_ray(
        batches, partial(share_maker, args, grid), workers=args.workers, on_cpu=on_cpu
    ):
        parts[rows[0]] = samples
        called, counts = called + calls, [a + b for a, b in zip(counts, more, strict=True)]
        done += len(rows)
        progress(done, total)
    if not work.is_folder:
        return total, called, torch.cat([parts[rows[0]] for rows in batches]), counts
    if lost := missing(work.out, range(work.requests.count), work.requests.count, work.suffix):
        raise ValueError(
            f"{len(lost)} samples are not in {work.out}, which the workers wrote: use a folder that all machines share"
        )
    return total, called, None, counts
