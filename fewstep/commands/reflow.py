"""`reflow`: pairs of noise and data that a model draws."""

import argparse
import json
import shlex
import sys
from pathlib import Path

from fewstep.commands.parser import Commands, add_command
from fewstep.commands.shared import (
    MODEL,
    add_device,
    add_guidance_scale,
    add_source,
    add_variant,
    guided_by,
    numbers,
    open_model,
)
from fewstep.common.console import progress_bar, say_next


def add(commands: Commands) -> None:
    p = add_command(
        commands,
        "reflow",
        run,
        "draw pairs of noise and data from a model, to train a straighter one on",
        examples=[
            "reflow checkerboard --count 10000 --out pairs",
            "reflow checkerboard --count 10000 --steps 64 --states 8 --out ways",
            "reflow ./stable-diffusion --prompts captions.txt --guidance-scale 7.5 --count 20000 --out pairs",
        ],
        may_run_code=True,
    )
    p.add_argument("model", help=MODEL)
    p.add_argument("--count", type=int, required=True, metavar="N", help="how many pairs")
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to; goes on with what is there")
    p.add_argument("--steps", type=int, metavar="N", help="2 for a flow map, 50 for a velocity field")
    p.add_argument("--solver", metavar="NAME", help="for a velocity field: euler, midpoint, heun (default), adaptive")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="decides the noise (default: 0)")
    p.add_argument("--labels", metavar="3,5", help="classes, given to the pairs in turn (default: all)")
    p.add_argument("--prompts", metavar="FILE", help="texts, given to the pairs in turn, for a model of text")
    add_source(p)
    add_guidance_scale(p, experts=True)
    p.add_argument(
        "--states",
        type=_states,
        default=0,
        metavar="K",
        help="states between noise and data to keep, for Trajectory: how many, or at which times, 0.25,0.5,0.75",
    )
    p.add_argument("--teacher", action="store_true", help="take the teacher of the run instead")
    p.add_argument("--batch", type=int, default=256, metavar="N", help="pairs drawn at once (default: 256)")
    p.add_argument("--shard", type=int, default=10_000, metavar="N", help="pairs in a file (default: 10000)")
    add_variant(p)
    add_device(p)


def _states(text: str) -> int | list[float]:
    return int(text) if text.isdigit() else [float(part) for part in text.split(",")]


def run(args: argparse.Namespace) -> int:
    from fewstep.common.distributed import environment
    from fewstep.flows.fields import NetworkField
    from fewstep.flows.guided import Guided, unguided
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
    is_map = isinstance(model, FlowMap)
    model, guidance = guided_by(args, model)
    if guidance is not None and not is_map and not isinstance(model, Guided) and not takes(model, "guidance"):
        if model.text is None:
            raise ValueError(
                f"--guidance-scale {guidance:g}: {args.model} is told no strength of guidance, and has no text"
            )
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
            states=args.states,
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
    kept = args.states if isinstance(args.states, int) else len(args.states)
    between = f", with {kept} states between" if kept else ""
    print(f"{args.out}: {args.count} pairs of noise and data{between}")
    method = "Trajectory" if args.states else "FlowMatching"
    train = ["--objective", method, "--out", f"{args.out}-trained"]
    if isinstance(unguided(model), NetworkField) and not args.teacher:
        # Starts from the model's own weights, and is judged by its trajectories.
        say_next([shlex.join(["fewstep", "distill", "--teacher", args.model, "--data", str(args.out), *train])])
    else:
        verb = "train"
        recipe = args.model if run else "checkerboard-reflow" if len(shape) == 1 else "photos-teacher"
        if args.states and not run:  # whose velocity teaches the rows with s = t
            recipe, verb, train = "checkerboard-trajectory", "distill", ["--teacher", args.model, *train[2:]]
        # As a mapping, it takes the place of the options of the recipe's own data too.
        data = json.dumps({"name": str(args.out)})
        # Between two data sets: a run's recipe names the source; noise on the way would bend what is straight.
        other = [] if not model.path.two_sided else ["--student.latent", "none"] if run else ["--source", args.source]
        say_next([shlex.join(["fewstep", verb, recipe, "--data", data, *other, *train])])
    return 0
