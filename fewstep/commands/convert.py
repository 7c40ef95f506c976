"""`convert`: a diffusion model as a flow."""

import argparse
import shlex
from pathlib import Path

from fewstep.commands.parser import Commands, add_command
from fewstep.commands.shared import add_device, add_variant, numbers
from fewstep.common.console import print_table, say_next


def add(commands: Commands) -> None:
    p = add_command(
        commands,
        "convert",
        run,
        "write a diffusion model as a flow, and check that both draw the same",
        examples=["convert ./ddpm-cifar10-32 --out cifar10-flow", "convert ./ddpm-cifar10-32 --out flow --steps 10 50"],
        may_run_code=True,
    )
    p.add_argument("model", help="a diffusers folder or hub name, or a run that trained a diffusion model")
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to")
    text = "a list of step counts to compare at (default: 10 50 200)"
    p.add_argument("--steps", type=int, nargs="+", metavar="N", help=text)
    p.add_argument("--count", type=int, default=8, metavar="N", help="samples compared (default: 8)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="decides the noise (default: 0)")
    p.add_argument("--labels", metavar="3,5", help="classes, given to the samples in turn (default: all)")
    text = "texts, given to the samples in turn, for a text model"
    p.add_argument("--prompt", nargs="+", action="extend", metavar="TEXT", help=text)
    p.add_argument("--no-check", action="store_true", help="write the flow without drawing samples")
    p.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    add_variant(p)
    add_device(p)


def run(args: argparse.Namespace) -> int:
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
            shlex.join(["fewstep", "sample", out, "--steps", "50"]),
            shlex.join(["fewstep", "reflow", out, "--count", "10000", "--out", f"{name}-pairs"]),
            shlex.join(["fewstep", "distill", "--teacher", out]),
        ]
    )
    return 0 if done.agreement is None or done.agreement.is_good else 1
