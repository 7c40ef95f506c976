"""`export`: the model of a run as a folder of its own."""

import argparse
import shlex
from pathlib import Path

from fewstep.commands.parser import Commands, add_command
from fewstep.common.console import say_next


def add(commands: Commands) -> None:
    p = add_command(
        commands,
        "export",
        run,
        "write a model that diffusers loads",
        examples=["export runs/checkerboard checkerboard-export", "export runs/checkerboard --format onnx"],
        may_run_code=True,
    )
    p.add_argument("model", type=Path, help="a run folder")
    p.add_argument("folder", type=Path, nargs="?", help="where to (default: model, in the run folder)")
    p.add_argument("--overwrite", action="store_true", help="replace an export that is there")
    p.add_argument("--adapter", action="store_true", help="of a run with student.lora: the adapter alone")
    text = "with --adapter: how its weights are called; kohya for older tools, diffusers for the pipeline of an export"
    p.add_argument("--keys", choices=("diffusers", "kohya", "peft"), help=text)
    text = "diffusers (default), or the bare map as a program for other runtimes"
    p.add_argument("--format", choices=("diffusers", "onnx", "torch"), default="diffusers", help=text)


def run(args: argparse.Namespace) -> int:
    from fewstep.common.model_files import read_json
    from fewstep.flows.description import code_named
    from fewstep.flows.interpolants import Interpolant
    from fewstep.models.adapter_files import DIFFUSERS_FILE
    from fewstep.models.writing import moments_in
    from fewstep.runs.export import export

    if args.keys is not None and not args.adapter:
        raise ValueError(f"--keys {args.keys} are names of an adapter's weights: say --adapter too")
    if args.format != "diffusers":
        return _export_program(args)
    folder = args.folder or args.model / ("adapter" if args.adapter else "model")
    folder = export(args.model, folder, overwrite=args.overwrite, adapter=args.adapter, keys=args.keys)
    if args.adapter:
        others = "diffusers' load_lora_weights reads" if (folder / DIFFUSERS_FILE).is_file() else "peft reads"
        print(f"{folder} is an adapter: fewstep.models.adapter_files.load_adapter reads it, and {others} it too")
        say_next([shlex.join(["fewstep", "export", str(args.model), f"{args.model.name}-export"])])
        return 0
    print(f"{folder} is a model of its own; its README.md says how to use it")
    if (moments := moments_in(folder)) is not None:
        mean, std = moments
        print(f"outside `fewstep sample`, its samples are in the units of the data as samples * {std:g} + {mean:g}")
    prompt = ["--prompt", "a photo of a cat"] if read_json(folder / "model_index.json").get("text_encoder") else []
    trust = ["--trust"] if code_named(read_json(folder / "config.json")) else []
    path = read_json(folder / "config.json").get("path")
    source = ["--source", "DATA"] if isinstance(path, dict) and path.get("name") == Interpolant.__name__ else []
    words = ["sample", str(folder), "--steps", "2", *trust, *prompt, *source]
    say_next([shlex.join(["fewstep", *words])])
    return 0


def _export_program(args: argparse.Namespace) -> int:
    from fewstep.runs.runtimes import export_program

    if args.adapter:
        raise ValueError(f"--adapter writes weights that peft and diffusers read, --format {args.format} a program")
    folder = args.folder or args.model / args.format
    done = export_program(args.model, folder, args.format, overwrite=args.overwrite)
    rows = "any number of rows" if done.largest_batch is None else f"up to {done.largest_batch} rows"
    print(f"{folder / done.file} takes {rows}, and differs from the model by {done.difference:.1e} at most, as checked")
    print(f"{folder / 'README.md'} has the code that samples it")
    return 0
