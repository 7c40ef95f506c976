"""`ui`: a page to try a model out."""

import argparse
import signal
from threading import Event

from fewstep.commands.parser import Commands, add_command
from fewstep.commands.shared import MODEL, add_device, add_variant
from fewstep.common.console import say


def add(commands: Commands) -> None:
    p = add_command(
        commands,
        "ui",
        run,
        "try a model out on a page: few steps and the teacher side by side",
        examples=["ui runs/checkerboard", "ui checkerboard-export --port 8000"],
        may_run_code=True,
    )
    p.add_argument("model", help=MODEL)
    p.add_argument("--host", default="127.0.0.1", metavar="NAME", help="where it listens (default: this machine alone)")
    p.add_argument("--port", type=int, metavar="N", help="(default: the first that is free from 7860)")
    add_variant(p)
    add_device(p)


def run(args: argparse.Namespace) -> int:
    from fewstep.common.distributed import World, choose_device
    from fewstep.playground.page import check_gradio, serve
    from fewstep.playground.shown import Playground

    check_gradio()  # before a model is loaded
    playground = Playground.open(args.model, choose_device(args.device, World()), args.variant)
    # SIGTERM ends it as Ctrl-C does, so that the images go with the page.
    before, close = signal.signal(signal.SIGTERM, signal.default_int_handler), None
    try:
        address, close = serve(playground, args.model, host=args.host, port=args.port)
        print(f"{address} shows {playground.name}; Ctrl-C ends it", flush=True)
        if args.host not in ("127.0.0.1", "localhost", "::1"):
            say(f"note: whoever reaches {args.host} can draw with it; there is no password")
        Event().wait()
    except KeyboardInterrupt:
        say("\nended")
    finally:
        if close is not None:
            close()
        signal.signal(signal.SIGTERM, before)
    return 0
