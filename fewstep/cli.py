"""The command line: parse, call, print. Nothing heavy is imported before a command is known."""

import argparse
import json
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewstep import __version__
from fewstep.errors import TrainingError

# The recipes of `fewstep train --data DIR` and `fewstep distill --teacher DIR`.
_DEFAULTS = {"train": ("data", "photos-teacher"), "distill": ("teacher", "distill")}
_KEYS = """any key of the recipe is a flag, with its value as YAML:
  --objective.ema 0.99   --training.lr 3e-4   --evaluation.steps "[1, 2]"
`fewstep recipes` lists the recipes that come along, `--dry-run` prints every key with its value."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for a training that failed, 2 for bad input, 130 if interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    usual, warnings.formatwarning = warnings.formatwarning, _note
    try:
        rest, overrides = _split(argv)
        args = _parser().parse_args(rest)
        args.argv = argv
        return args.command(args, overrides)
    except (ValueError, OSError, ImportError, TrainingError) as error:
        if is_debug:
            raise
        # What Python calls resume=False and overwrite=True are flags here.
        text = " ".join(str(error).split()).replace("resume=False", "--fresh").replace("overwrite=True", "--overwrite")
        print(f"error: {text}", file=sys.stderr)
        return 1 if isinstance(error, TrainingError) else 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning = usual


def _note(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> str:
    """A warning as one line, without the place in the code."""
    return f"note: {' '.join(str(message).split())}\n"


def _split(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """For `train` and `distill`: what the parser knows, and the flags that are keys of the recipe."""
    if not argv or argv[0] not in _DEFAULTS:
        return argv, {}
    own, switches = {"--out"}, {"--dry-run", "--fresh", "--help", "-h"}
    rest, overrides = [argv[0]], {}
    words = iter(argv[1:])
    for word in words:
        flag, has_value, value = word.partition("=")
        if not flag.startswith("--") or flag in switches:
            rest.append(word)
            continue
        value = value if has_value else next(words, None)
        if value is None:
            raise ValueError(f"{flag} needs a value, as in `{flag} 1` (true and false too)")
        if flag in own:
            rest += [flag, value]
        else:
            overrides[flag.removeprefix("--").replace("-", "_")] = value
    return rest, overrides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fewstep",
        description="Turn a diffusion or flow model into a generator that needs 1 to 8 network calls.",
        epilog="--debug, anywhere, shows the traceback of an error. Start: fewstep distill checkerboard-itvm",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fewstep {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, function: Any, text: str, **more: Any) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **more,
        )
        made.set_defaults(command=function, name=name)
        return made

    for name, text in (("train", "train a model from data"), ("distill", "distill a teacher into a few-step model")):
        p = command(name, _fit, text, epilog=_KEYS)
        p.add_argument("recipe", nargs="?", help="a recipe by path or name, or a run folder to go on with")
        if name == "distill":
            p.add_argument("--teacher", metavar="FOLDER", help="a diffusers folder, a run, an exact field")
        p.add_argument("--data", metavar="FOLDER", help="a data set by name or path")
        p.add_argument("--steps", metavar="N", help="updates")
        p.add_argument("--seed", metavar="N", help="decides every random number")
        p.add_argument("--out", type=Path, metavar="FOLDER", help="the run folder (default: runs/NAME)")
        p.add_argument("--fresh", action="store_true", help="throw away the run in that folder and start again")
        p.add_argument("--dry-run", action="store_true", help="check everything, print the whole recipe and stop")

    p = command("sample", _sample, "draw samples")
    p.add_argument("model", help="a run, an export or a diffusers folder")
    p.add_argument("--steps", type=int, metavar="N", help="2 for a flow map, 50 for a velocity field")
    p.add_argument("--count", type=int, default=64, metavar="N", help="how many (default: 64)")
    p.add_argument(
        "--seed", type=int, default=0, metavar="N", help="sample i of a seed is always the same (default: 0)"
    )
    p.add_argument("--out", type=Path, metavar="PATH", help="a .png grid, .npy, .npz, or a folder of PNGs")
    p.add_argument("--labels", metavar="3,5", help="classes, given to the samples in turn (default: all)")
    p.add_argument("--guidance", type=float, metavar="W", help="its strength, for a model that takes it")
    p.add_argument(
        "--gamma", type=float, metavar="G", help="re-noising between steps, 0 to 1 (default: the map's, mostly 0)"
    )
    p.add_argument("--grid", default="uniform", metavar="NAME", help="times of the steps: uniform, shifted, quadratic")
    p.add_argument("--solver", metavar="NAME", help="for a velocity field: euler (default), midpoint, heun, adaptive")
    p.add_argument("--teacher", action="store_true", help="sample the teacher of the run instead")
    p.add_argument("--batch", type=int, default=256, metavar="N", help="samples drawn at once (default: 256)")
    p.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: a GPU if there is one)")

    p = command("evaluate", _evaluate, "measure quality against network calls")
    p.add_argument("run", type=Path, help="a run folder")
    p.add_argument("--steps", type=int, nargs="+", metavar="N", help="step counts (default: the recipe's)")
    p.add_argument("--teacher-steps", type=int, nargs="+", metavar="N", help="those of the teacher")
    p.add_argument("--count", type=int, metavar="N", help="samples at each (default: the recipe's)")
    p.add_argument("--seed", type=int, metavar="N", help="of the samples (default: the recipe's)")
    p.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: a GPU if there is one)")

    p = command("compare", _compare, "put runs side by side, or train methods and put those side by side")
    p.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="evaluated run folders; with --methods, one recipe"
    )
    p.add_argument("--out", type=Path, default=Path("compare"), metavar="FOLDER", help="(default: compare)")
    p.add_argument(
        "--methods", nargs="+", metavar="NAME", help="train these on the recipe: NAME, or NAME:key=value,key=value"
    )
    p.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="with --methods (default: 0)")
    budget = p.add_mutually_exclusive_group()
    budget.add_argument("--train-steps", type=int, metavar="N", help="updates of each method (default: the recipe's)")
    budget.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="the same time for each: all methods' steps are timed in turn first, and S seconds over that time is how "
        "many updates a method gets; so a run can be repeated and goes on, however busy the machine is",
    )
    p.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="keys of the recipe")

    p = command("reflow", _reflow, "draw pairs of noise and data from a model, to train a straighter one on")
    p.add_argument("model", help="a run, an export or a diffusers folder")
    p.add_argument("--count", type=int, required=True, metavar="N", help="how many pairs")
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to; goes on with what is there")
    p.add_argument("--steps", type=int, metavar="N", help="2 for a flow map, 50 for a velocity field")
    p.add_argument("--solver", metavar="NAME", help="for a velocity field: euler, midpoint, heun (default), adaptive")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="decides the noise (default: 0)")
    p.add_argument("--labels", metavar="3,5", help="classes, given to the pairs in turn (default: all)")
    p.add_argument("--teacher", action="store_true", help="take the teacher of the run instead")
    p.add_argument("--batch", type=int, default=256, metavar="N", help="pairs drawn at once (default: 256)")
    p.add_argument("--shard", type=int, default=10_000, metavar="N", help="pairs in a file (default: 10000)")
    p.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: a GPU if there is one)")

    p = command("export", _export, "write a model that diffusers loads")
    p.add_argument("model", type=Path, help="a run folder")
    p.add_argument("folder", type=Path, nargs="?", help="where to (default: model, in the run folder)")
    p.add_argument("--overwrite", action="store_true", help="replace an export that is there")

    p = command("cite", _cite, "print BibTeX for what a run, recipe or method uses")
    p.add_argument("what", nargs="+", metavar="WHAT", help="run folders, recipes, methods by name or FILE.py:CLASS")

    p = command("recipes", _recipes, "list the recipes that come along")
    p.add_argument("recipe", nargs="?", help="print this one, to start your own from")
    return parser


def _fit(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    from fewstep.config import load_recipe
    from fewstep.judge import next_commands
    from fewstep.maps import FlowMap
    from fewstep.runs import build, run
    from fewstep.training.distributed import environment

    source, needed = args.recipe, _DEFAULTS[args.name][0]
    if source is None:
        if needed not in overrides:
            raise ValueError(f"fewstep {args.name} needs a recipe or --{needed}: `fewstep recipes` lists recipes")
        source = _DEFAULTS[args.name][1]
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
        _say(f"# everything fits: a {type(student).__name__} of {size:,} parameters, into {out}")
        _next([shlex.join(word for word in shlex.split(again) if word != "--dry-run")])
        return 0

    done = run(recipe, out, fresh=args.fresh)
    if done.result.stopped == "interrupted":
        _next([again.replace(" --fresh", "")])
        return 130
    if not environment().is_main:
        return 0
    _table(done.evaluation)
    print(f"{out / 'report.html'} shows it all")
    _next(next_commands(out, recipe, isinstance(done.result.student, FlowMap)))
    return 0


def _sample(args: argparse.Namespace, _: dict[str, str]) -> int:
    from fewstep.drawing import check_out, draw, write
    from fewstep.maps import FlowMap
    from fewstep.training.distributed import World, choose_device

    model, run, shape = _open(args)
    is_map = isinstance(model, FlowMap)
    steps = args.steps if args.steps is not None else 2 if is_map else 50
    out = args.out or Path("samples.png" if len(shape) == 3 or shape == (2,) else "samples.npy")
    check_out(out, shape)
    options = {"grid": args.grid, "gamma": args.gamma, "solver": args.solver, "guidance": args.guidance}
    samples, cond, calls = draw(
        model.to(choose_device(args.device, World())),
        args.count,
        steps,
        shape=shape,
        seed=args.seed,
        labels=_numbers("--labels", args.labels) if args.labels else None,
        batch=args.batch,
        **{name: value for name, value in options.items() if value is not None},
    )
    if run is not None and run.recipe.data.options.get("normalize"):
        samples = _denormalized(run.recipe, samples)
    write(samples, cond, out)
    print(f"{out}: {args.count} samples, {calls:g} network calls each")
    if run is None or args.teacher:
        _next([f"fewstep sample {args.model} --steps {2 * steps} --out samples-{2 * steps}{out.suffix}"])
    else:
        _next([f"fewstep evaluate {args.model}", f"fewstep export {args.model} {Path(args.model).name}-export"])
    return 0


def _open(args: argparse.Namespace) -> tuple[Any, Any, tuple[int, ...]]:
    """The model that is asked for (with --teacher, the teacher of the run), its run if it is one, a sample's shape."""
    from fewstep.drawing import shape_of
    from fewstep.loading import load
    from fewstep.parts import make_teacher
    from fewstep.runs import open_run

    run = open_run(args.model) if (Path(args.model) / "recipe.yaml").is_file() else None
    if args.teacher and (run is None or run.recipe.teacher is None):
        raise ValueError(f"--teacher: {args.model} is no run that has a teacher")
    model = load(args.model) if run is None else run.model
    if args.teacher and run is not None and run.recipe.teacher is not None:
        model = make_teacher(run.recipe.teacher)
    return model, run, shape_of(model) if run is None else run.shape


def _denormalized(recipe: Any, samples: Any) -> Any:
    """Samples in the units of the data, where the run brought those to mean 0 and deviation 1."""
    from fewstep.data import load_data

    data: Any = load_data(recipe.data.name, **recipe.data.options)
    return data.denormalize(samples)


def _reflow(args: argparse.Namespace, _: dict[str, str]) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from fewstep.fields import NetworkField
    from fewstep.maps import FlowMap
    from fewstep.reflow import make_pairs
    from fewstep.training.distributed import environment

    model, run, shape = _open(args)
    again, is_main = shlex.join(["fewstep", *args.argv]), environment().is_main
    is_map = isinstance(model, FlowMap)
    with Progress(console=Console(stderr=True), disable=not (is_main and sys.stderr.isatty()), transient=True) as bar:
        task = bar.add_task("pairs", total=args.count)
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
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if not is_main:
        return 0
    if missing:
        print(f"{args.out}: {missing} shards are still missing, which other processes draw")
        _next([again])
        return 0
    print(f"{args.out}: {args.count} pairs of noise and data")
    train = ["--objective", "FlowMatching", "--out", f"{args.out}-trained"]
    if isinstance(model, NetworkField) and not args.teacher:
        # Starts from the model's own weights, and is judged by its trajectories.
        _next([shlex.join(["fewstep", "distill", "--teacher", args.model, "--data", str(args.out), *train])])
    else:
        recipe = args.model if run else "checkerboard-reflow" if len(shape) == 1 else "photos-teacher"
        # As a mapping, it takes the place of the options of the recipe's own data too.
        data = json.dumps({"name": str(args.out)})
        _next([shlex.join(["fewstep", "train", recipe, "--data", data, *train])])
    return 0


def _evaluate(args: argparse.Namespace, _: dict[str, str]) -> int:
    from fewstep.runs import evaluate_run

    asked = {"steps": args.steps, "teacher_steps": args.teacher_steps, "count": args.count, "seed": args.seed}
    found = evaluate_run(args.run, args.device, **{name: value for name, value in asked.items() if value is not None})
    if found is None:
        raise ValueError(f"{args.run} has nothing to be measured by: images without labels, and no teacher")
    _table(found)
    print(f"{args.run / 'quality.png'}, {args.run / 'quality.json'} and {args.run / 'report.html'} have it too")
    _next([f"fewstep sample {args.run} --out {args.run.name}.png", f"fewstep export {args.run} {args.run.name}-export"])
    return 0


def _compare(args: argparse.Namespace, _: dict[str, str]) -> int:
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
    _print_table(*compare_runs(found, args.out))
    print(f"{args.out / 'compare.html'} shows it with plots")
    _next([f"fewstep export {args.runs[0]} {args.runs[0].name}-export"])
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
        say=_say,
    )
    for metric in found.metrics[:1]:
        print(found.caption(metric))
        _print_table(*found.table(metric))
    print(f"{args.out / 'compare.html'} shows it with plots, {args.out / 'compare.md'} is the same as text")
    done = next((run for run in found.runs if run.evaluation), None)
    if done is not None:
        _next([f"fewstep sample {done.folder} --steps 1 --out {done.folder.name}.png"])
    return 0


def _export(args: argparse.Namespace, _: dict[str, str]) -> int:
    from fewstep.evaluation.evaluate import Evaluation
    from fewstep.exporting import export

    file = args.model / "quality.json"
    table = _markdown(*Evaluation.from_json(file.read_text()).table()) if file.is_file() else None
    folder = export(args.model, args.folder or args.model / "model", overwrite=args.overwrite, quality=table)
    print(f"{folder} is a model of its own; its README.md says how to use it")
    _next([f"fewstep sample {folder} --steps 2 --out {folder.name}.png"])
    return 0


def _cite(args: argparse.Namespace, _: dict[str, str]) -> int:
    from fewstep.citing import cite

    print(cite(*args.what), end="")
    _next([shlex.join(["fewstep", *args.argv]) + " > papers.bib"])
    return 0


def _recipes(args: argparse.Namespace, _: dict[str, str]) -> int:
    from fewstep.config import describe, find_recipe, known_recipes

    if args.recipe is not None:
        print(find_recipe(args.recipe).read_text(), end="")
        return 0
    known = known_recipes()
    width = max(map(len, known))
    for name, path in known.items():
        print(f"{name:<{width}}  {describe(path)}")
    _next(["fewstep distill checkerboard-itvm", "fewstep recipes checkerboard-itvm > mine.yaml"])
    return 0


def _numbers(flag: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} {text}: whole numbers with commas between are needed, such as 3,5") from None


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _next(commands: Sequence[str]) -> None:
    """What to type next, on stderr, so that the output proper can be piped."""
    _say("next:\n" + "\n".join(f"  {command}" for command in commands))


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(evaluation: Any) -> None:
    if evaluation is not None:
        _print_table(*evaluation.table())


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for name in columns:
        table.add_column(name, justify="left" if name in ("model", "metric", "method") else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(_cell, row))
    # Where there is no terminal, no line may break.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
