"""What each command of the command line does: call, and print what to look at and to type next.

Nothing heavy is imported before a command runs.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from fewstep.console import markdown, print_evaluation, print_table, progress_bar, say, say_next

# The recipes of `fewstep train --data DIR` and `fewstep distill --teacher DIR`, and of `train` with both.
DEFAULTS = {"train": ("data", "photos-teacher"), "distill": ("teacher", "distill")}
_FROM_A_MODEL = "finetune"


def run_fit(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    from fewstep.config import load_recipe
    from fewstep.judge import next_commands
    from fewstep.maps import FlowMap
    from fewstep.runs import build, run
    from fewstep.training.distributed import environment

    source, needed = args.recipe, DEFAULTS[args.name][0]
    if source is None:
        if needed not in overrides:
            raise ValueError(f"fewstep {args.name} needs a recipe or --{needed}: `fewstep recipes` lists recipes")
        is_finetuning = args.name == "train" and "teacher" in overrides
        source = _FROM_A_MODEL if is_finetuning else DEFAULTS[args.name][1]
        overrides.setdefault("name", f"{Path(overrides[needed].split(':')[-1]).name}-{args.name}")
    recipe = load_recipe(source, overrides)
    if args.name == "distill" and recipe.teacher is None:
        raise ValueError(f"{recipe.name} has no teacher to distill: fewstep train {source}, or --teacher FOLDER")
    out = args.out or (Path(source) if Path(source).is_dir() else Path("runs") / recipe.name)
    again = shlex.join(["fewstep", *args.argv])
    if args.dry_run:
        student = build(recipe).student
        print(recipe.as_yaml(), end="")
        size = sum(p.numel() for p in student.parameters())
        moving = sum(p.numel() for p in student.parameters() if p.requires_grad)
        some = f", {moving:,} of which train" if moving < size else ""
        say(f"# everything fits: a {type(student).__name__} of {size:,} parameters{some}, into {out}")
        say_next([shlex.join(word for word in shlex.split(again) if word != "--dry-run")])
        return 0

    done = run(recipe, out, fresh=args.fresh)
    if done.result.stopped == "interrupted":
        say_next([again.replace(" --fresh", "")])
        return 130
    if not environment().is_main:
        return 0
    print_evaluation(done.evaluation)
    print(f"{out / 'report.html'} shows it all")
    say_next(next_commands(out, recipe, isinstance(done.result.student, FlowMap)))
    return 0


def run_sample(args: argparse.Namespace, _: dict[str, str]) -> int:
    from fewstep.drawing import check_out, draw, write
    from fewstep.maps import FlowMap
    from fewstep.training.distributed import World, choose_device

    model, run, shape = _open(args)
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
        labels=_numbers("--labels", args.labels) if args.labels else None,
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


def _open(args: argparse.Namespace) -> tuple[Any, Any, tuple[int, ...]]:
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


def run_reflow(args: argparse.Namespace, _: dict[str, str]) -> int:
    from fewstep.drawing import image_channels
    from fewstep.fields import NetworkField, unguided
    from fewstep.maps import FlowMap
    from fewstep.reflow import make_pairs
    from fewstep.training.distributed import environment

    model, run, shape = _open(args)
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
            labels=_numbers("--labels", args.labels) if args.labels else None,
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


def run_evaluate(args: argparse.Namespace, _: dict[str, str]) -> int:
    from fewstep.runs import evaluate_run

    asked = {"steps": args.steps, "teacher_steps": args.teacher_steps, "count": args.count, "seed": args.seed}
    found = evaluate_run(args.run, args.device, **{name: value for name, value in asked.items() if value is not None})
    if found is None:
        raise ValueError(f"{args.run} has nothing to be measured by: images without labels, and no teacher")
    print_evaluation(found)
    print(f"{args.run / 'quality.png'}, {args.run / 'quality.json'} and {args.run / 'report.html'} have it too")
    say_next(
        [f"fewstep sample {args.run} --out {args.run.name}.png", f"fewstep export {args.run} {args.run.name}-export"]
    )
    return 0


def run_compare(args: argparse.Namespace, _: dict[str, str]) -> int:
    from fewstep.evaluation.evaluate import Evaluation
    from fewstep.judge import compare_runs

    if args.methods:
        return _compare_methods(args)
    found = {}
    for run in args.runs:
        file = run / "quality.json"
        if not file.is_file():
            raise FileNotFoundError(f"{run} has not been evaluated: fewstep evaluate {run}")
        found[run.name if run.name not in found else str(run)] = Evaluation.from_json(file.read_text())
    print_table(*compare_runs(found, args.out))
    print(f"{args.out / 'compare.html'} shows it with plots")
    say_next([f"fewstep export {args.runs[0]} {args.runs[0].name}-export"])
    return 0


def _compare_methods(args: argparse.Namespace) -> int:
    from fewstep.comparing import compare_methods

    if len(args.runs) != 1:
        raise ValueError(f"--methods are trained on one recipe, not on {len(args.runs)}")
    overrides = {}
    for word in args.set:
        key, has_value, value = word.partition("=")
        if not has_value:
            raise ValueError(f"--set {word}: KEY=VALUE is needed, as in --set training.lr=1e-3")
        overrides[key] = value
    found = compare_methods(
        args.runs[0],
        args.methods,
        seeds=args.seeds,
        steps=args.train_steps,
        seconds=args.seconds,
        out=args.out,
        overrides=overrides,
        say=say,
    )
    for metric in found.metrics[:1]:
        print(found.caption(metric))
        print_table(*found.table(metric))
    print(f"{args.out / 'compare.html'} shows it with plots, {args.out / 'compare.md'} is the same as text")
    done = next((run for run in found.runs if run.evaluation), None)
    if done is not None:
        say_next([f"fewstep sample {done.folder} --steps 1 --out {done.folder.name}.png"])
    return 0


def run_export(args: argparse.Namespace, _: dict[str, str]) -> int:
    from fewstep.evaluation.evaluate import Evaluation
    from fewstep.exporting import export

    file = args.model / "quality.json"
    table = markdown(*Evaluation.from_json(file.read_text()).table()) if file.is_file() else None
    folder = args.folder or args.model / ("adapter" if args.adapter else "model")
    folder = export(args.model, folder, overwrite=args.overwrite, quality=table, adapter=args.adapter)
    if args.adapter:
        print(f"{folder} is an adapter: fewstep.lora.load_adapter, diffusers' load_lora_weights or peft read it")
        say_next([f"fewstep export {args.model} {args.model.name}-export"])
        return 0
    print(f"{folder} is a model of its own; its README.md says how to use it")
    say_next([f"fewstep sample {folder} --steps 2 --out {folder.name}.png"])
    return 0


def run_convert(args: argparse.Namespace, _: dict[str, str]) -> int:
    from fewstep.converting import convert

    done = convert(
        args.model,
        args.out,
        check=not args.no_check,
        count=args.count,
        steps=args.steps,
        seed=args.seed,
        labels=_numbers("--labels", args.labels) if args.labels else None,
        prompts=args.prompt,
        device=args.device,
        overwrite=args.overwrite,
    )
    for what, line in done.rows():
        print(f"{what + ':':<15} {line}")
    if done.agreement is not None:
        print_table(*done.agreement.table())
    print(done.verdict)
    if done.picture is not None:
        print(f"{args.out / done.picture} shows original, flow and difference; {args.out / 'README.md'} has it all")
    out = shlex.quote(str(args.out))
    say_next(
        [
            f"fewstep sample {out} --steps 50 --out {shlex.quote(args.out.name)}.png",
            f"fewstep reflow {out} --count 10000 --out {shlex.quote(args.out.name)}-pairs",
            f"fewstep distill --teacher {out}",
        ]
    )
    return 0 if done.agreement is None or done.agreement.is_good else 1


def run_cite(args: argparse.Namespace, _: dict[str, str]) -> int:
    from fewstep.citing import cite

    print(cite(*args.what), end="")
    say_next([shlex.join(["fewstep", *args.argv]) + " > papers.bib"])
    return 0


def run_recipes(args: argparse.Namespace, _: dict[str, str]) -> int:
    from fewstep.config import describe, find_recipe, known_recipes

    if args.recipe is not None:
        print(find_recipe(args.recipe).read_text(), end="")
        return 0
    known = known_recipes()
    width = max(map(len, known))
    for name, path in known.items():
        print(f"{name:<{width}}  {describe(path)}")
    say_next(["fewstep distill checkerboard-itvm", "fewstep recipes checkerboard-itvm > mine.yaml"])
    return 0


def _numbers(flag: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} {text}: whole numbers with commas between are needed, such as 3,5") from None
