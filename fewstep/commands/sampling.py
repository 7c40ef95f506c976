"""`sample` and `reflow`: what a model draws."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from fewstep.commands.words import numbers
from fewstep.console import progress_bar, say_next


def run_sample(args: argparse.Namespace, _: dict[str, str]) -> int:
    from fewstep.drawing import check_out, draw, write
    from fewstep.maps import FlowMap
    from fewstep.training.distributed import World, choose_device

    model, run, shape = open_model(args)
    is_map = isinstance(model, FlowMap)
    steps = args.steps if args.steps is not None else 2 if is_map else 50
    latents = None if args.latents else model.latents
    written = shape if latents is None else latents.image_shape_of(shape)
    is_drawn = (len(written) == 3 and written[0] in (1, 3)) or written == (2,)
    out = args.out or Path("samples.png" if is_drawn else "samples.npy")
    check_out(out, written)
    options = {"grid": args.grid, "gamma": args.gamma, "solver": args.solver, "guidance": args.guidance}
    samples, cond, calls = draw(
        model.to(choose_device(args.device, World())),
        args.count,
        steps,
        shape=shape,
        seed=args.seed,
        labels=numbers("--labels", args.labels) if args.labels else None,
        prompts=args.prompt,
        given={} if run is None else _given(run.recipe, model, args.count),
        decode=latents is not None,
        batch=args.batch,
        **{name: value for name, value in options.items() if value is not None},
    )
    if run is not None and run.recipe.data.options.get("normalize"):
        samples = _denormalized(run.recipe, samples)
    write(samples, cond, out)
    print(f"{out}: {args.count} samples, {calls:g} network calls each")
    if run is None or args.teacher:
        prompt = ["--prompt", *args.prompt] if args.prompt else []
        more = ["--steps", str(2 * steps), "--out", f"samples-{2 * steps}{out.suffix}"]
        say_next([shlex.join(["fewstep", "sample", args.model, *more, *prompt])])
    else:
        say_next([f"fewstep evaluate {args.model}", f"fewstep export {args.model} {Path(args.model).name}-export"])
    return 0


def run_reflow(args: argparse.Namespace, _: dict[str, str]) -> int:
    from fewstep.drawing import image_channels
    from fewstep.fields import NetworkField, unguided
    from fewstep.maps import FlowMap
    from fewstep.reflow import make_pairs
    from fewstep.training.distributed import environment

    model, run, shape = open_model(args)
    if image_channels(model):
        raise ValueError(
            f"{args.model} takes an image beside the state, and pairs are drawn of classes alone: draw its noise and "
            "samples in Python, fewstep.sample(model, noise, image=...), and train on arrays"
        )
    again, is_main = shlex.join(["fewstep", *args.argv]), environment().is_main
    is_map = isinstance(model, FlowMap)
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


def open_model(args: argparse.Namespace) -> tuple[Any, Any, tuple[int, ...]]:
    """The model that is asked for (with --teacher, the teacher of the run), its run if it is one, a sample's shape."""
    from fewstep.drawing import shape_of
    from fewstep.parts import find_model, make_teacher
    from fewstep.runs import open_run

    run = open_run(args.model) if (Path(args.model) / "recipe.yaml").is_file() else None
    if args.teacher and (run is None or run.recipe.teacher is None):
        raise ValueError(f"--teacher: {args.model} is no run that has a teacher")
    model = find_model(args.model) if run is None else run.model
    if args.teacher and run is not None and run.recipe.teacher is not None:
        model = make_teacher(run.recipe.teacher)
    return model, run, shape_of(model) if run is None else run.shape


def _given(recipe: Any, model: Any, count: int) -> dict[str, Any]:
    """The conditions of ``count`` samples besides their classes: those of the first rows of a run's data, which are
    read where the model needs them."""
    import torch

    from fewstep.data import load_data
    from fewstep.drawing import needed_conditions, takes
    from fewstep.randomness import generator

    if recipe.data.name == "teacher" or not (needed_conditions(model) or recipe.data.options.get("conditions")):
        return {}
    data = load_data(recipe.data.name, **recipe.data.options)
    cond = data.rows(torch.arange(min(count, data.size or count)), generator(recipe.seed)).cond
    return {name: value for name, value in cond.items() if name != "class_labels" and takes(model, name)}


def _denormalized(recipe: Any, samples: Any) -> Any:
    """Samples in the units of the data, where the run brought those to mean 0 and deviation 1."""
    from fewstep.data import load_data

    data: Any = load_data(recipe.data.name, **recipe.data.options)
    return data.denormalize(samples)
