"""`train`, `distill`, `evaluate` and `compare`: runs, from their recipe to their place among others."""

import argparse
import shlex
from pathlib import Path

from fewstep.common.console import print_evaluation, print_table, say, say_next

# The recipes of `fewstep train --data DIR` and `fewstep distill --teacher DIR`, and of `train` with both.
DEFAULTS = {"train": ("data", "photos-teacher"), "distill": ("teacher", "distill")}
_FROM_A_MODEL = "finetune"


def run_fit(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    from fewstep.runs.recipes import load_recipe

    source, needed = args.recipe, DEFAULTS[args.name][0]
    if source is None:
        if needed not in overrides:
            raise ValueError(f"fewstep {args.name} needs a recipe or --{needed}: `fewstep recipes` lists recipes")
        is_finetuning = args.name == "train" and "teacher" in overrides
        source = _FROM_A_MODEL if is_finetuning else DEFAULTS[args.name][1]
        overrides.setdefault("name", f"{Path(overrides[needed].split(':')[-1]).name}-{args.name}")
    if Path(source).is_dir() and not args.fresh:
        from fewstep.training.leaving import check_from_recipe

        check_from_recipe(Path(source))  # before its recipe, which says only what is known of its parts
    recipe = load_recipe(source, overrides)
    if args.name == "distill" and recipe.teacher is None:
        raise ValueError(f"{recipe.name} has no teacher to distill: fewstep train {source}, or --teacher FOLDER")
    # And torch, once there is something to train.
    from fewstep.common.distributed import environment
    from fewstep.flows.maps import FlowMap
    from fewstep.runs.build import build
    from fewstep.runs.judge import next_commands
    from fewstep.runs.run import run

    out = args.out or (Path(source) if Path(source).is_dir() else Path("runs") / recipe.name)
    if args.dry_run:
        built = build(recipe)
        student = built.student
        print(built.recipe.as_yaml(), end="")
        size = sum(p.numel() for p in student.parameters())
        moving = sum(p.numel() for p in student.parameters() if p.requires_grad)
        some = f", {moving:,} of which train" if moving < size else ""
        say(f"# everything fits: a {type(student).__name__} of {size:,} parameters{some}, into {out}")
        start = [word for word in args.argv if word != "--dry-run"]
        keys = [word for key, value in overrides.items() if key != "name" for word in (f"--{key}", value)]
        planned = ["fewstep", "plan", *([args.recipe] if args.recipe else []), *keys]  # memory and time
        say_next([shlex.join(["fewstep", *start]), shlex.join(planned)])
        return 0

    done = run(recipe, out, fresh=args.fresh)
    if done.result.stopped == "interrupted":
        say_next([shlex.join(["fewstep", *(word for word in args.argv if word != "--fresh")])])
        return 130
    if not environment().is_main:
        return 0
    print_evaluation(done.evaluation)
    if (out / "report.html").is_file():
        print(f"{out / 'report.html'} shows it all")
    else:
        print(f"{out} has its checkpoints and samples; fewstep evaluate {shlex.quote(str(out))} measures it")
    say_next(next_commands(out, recipe, isinstance(done.result.student, FlowMap)))
    return 0


def run_evaluate(args: argparse.Namespace, _: dict[str, str]) -> int:
    from fewstep.runs.run import evaluate_run

    asked = {"steps": args.steps, "teacher_steps": args.teacher_steps, "count": args.count, "seed": args.seed}
    asked |= {"teacher": args.teacher, "data": args.data}
    found = evaluate_run(args.run, args.device, **{name: value for name, value in asked.items() if value is not None})
    if found is None:
        raise ValueError(f"{args.run} has nothing to be measured by: images without labels, and no teacher")
    print_evaluation(found)
    print(f"{args.run / 'quality.png'}, {args.run / 'quality.json'} and {args.run / 'report.html'} have it too")
    run, name = str(args.run), args.run.name
    say_next(
        [
            shlex.join(["fewstep", "sample", run, "--out", f"{name}.png"]),
            shlex.join(["fewstep", "export", run, f"{name}-export"]),
        ]
    )
    return 0


def run_compare(args: argparse.Namespace, _: dict[str, str]) -> int:
    from fewstep.evaluation.results import Evaluation
    from fewstep.runs.judge import compare_runs

    if args.methods:
        return _compare_methods(args)
    found, others = {}, []
    for run in args.runs:
        if (run / "quality.json").is_file():
            name = run.name if run.name not in found else str(run)
            found[name] = Evaluation.read(run / "quality.json")
        else:
            others.append(run)
    if not found:
        raise FileNotFoundError(f"{others[0]} has not been evaluated: fewstep evaluate {shlex.quote(str(others[0]))}")
    for run in others:
        say(f"note: {run} has not been evaluated, and is left out: fewstep evaluate {shlex.quote(str(run))}")
    for caption, columns, rows in (tables := compare_runs(found, args.out)):
        if len(tables) > 1:
            print(caption)
        print_table(columns, rows)
    if len(tables) > 1:
        say("note: what was not measured alike is in tables of its own")
    print(f"{args.out / 'compare.html'} shows it with plots")
    best = next(run for run in args.runs if run not in others)
    say_next([shlex.join(["fewstep", "export", str(best), f"{best.name}-export"])])
    return 0


def _compare_methods(args: argparse.Namespace) -> int:
    from fewstep.runs.compare import compare_methods

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
        picture = f"{done.folder.name}.png"
        say_next([shlex.join(["fewstep", "sample", str(done.folder), "--steps", "1", "--out", picture])])
    return 0
