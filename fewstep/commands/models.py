"""`export`, `convert` and `push`: models as folders, and those on the hub."""

import argparse
import shlex

from fewstep.commands.words import numbers
from fewstep.common.console import print_table, say_next


def run_export(args: argparse.Namespace, _: dict[str, str]) -> int:
    from fewstep.common.model_files import read_json
    from fewstep.flows.description import code_named
    from fewstep.models.lora import DIFFUSERS_FILE
    from fewstep.models.writing import moments_in
    from fewstep.runs.export import export

    if args.format != "diffusers":
        return _export_program(args)
    folder = args.folder or args.model / ("adapter" if args.adapter else "model")
    folder = export(args.model, folder, overwrite=args.overwrite, adapter=args.adapter)
    if args.adapter:
        others = "diffusers' load_lora_weights reads" if (folder / DIFFUSERS_FILE).is_file() else "peft reads"
        print(f"{folder} is an adapter: fewstep.models.lora.load_adapter reads it, and {others} it too")
        say_next([shlex.join(["fewstep", "export", str(args.model), f"{args.model.name}-export"])])
        return 0
    print(f"{folder} is a model of its own; its README.md says how to use it")
    if (moments := moments_in(folder)) is not None:
        mean, std = moments
        print(f"outside `fewstep sample`, its samples are in the units of the data as samples * {std:g} + {mean:g}")
    prompt = ["--prompt", "a photo of a cat"] if read_json(folder / "model_index.json").get("text_encoder") else []
    trust = ["--trust"] if code_named(read_json(folder / "config.json")) else []
    say_next(
        [shlex.join(["fewstep", "sample", str(folder), "--steps", "2", *trust, *prompt, "--out", f"{folder.name}.png"])]
    )
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


def run_convert(args: argparse.Namespace, _: dict[str, str]) -> int:
    from fewstep.runs.convert import convert

    done = convert(
        args.model,
        args.out,
        check=not args.no_check,
        count=args.count,
        steps=args.steps,
        seed=args.seed,
        labels=numbers("--labels", args.labels) if args.labels else None,
        prompts=args.prompt,
        device=args.device,
        overwrite=args.overwrite,
        variant=args.variant,
    )
    for what, line in done.rows():
        print(f"{what + ':':<15} {line}")
    if done.agreement is not None:
        print_table(*done.agreement.table())
    print(done.verdict)
    if done.picture is not None:
        print(f"{args.out / done.picture} shows original, flow and difference; {args.out / 'README.md'} has it all")
    out, name = str(args.out), args.out.name
    say_next(
        [
            shlex.join(["fewstep", "sample", out, "--steps", "50", "--out", f"{name}.png"]),
            shlex.join(["fewstep", "reflow", out, "--count", "10000", "--out", f"{name}-pairs"]),
            shlex.join(["fewstep", "distill", "--teacher", out]),
        ]
    )
    return 0 if done.agreement is None or done.agreement.is_good else 1


def run_push(args: argparse.Namespace, _: dict[str, str]) -> int:
    from fewstep.models.hub import how_to_load, kind_of, push

    print(push(args.folder, args.name, private=args.private or None, message=args.message))
    say_next([how_to_load(args.name, kind_of(args.folder))])
    return 0
