"""`export` and `convert`: models as folders."""

import argparse
import shlex

from fewstep.commands.words import numbers
from fewstep.console import markdown, print_table, say_next


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
        labels=numbers("--labels", args.labels) if args.labels else None,
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
