"""`ui`: a page to try a model out."""

import argparse
import signal
from threading import Event

from fewstep.common.console import say


def run_ui(args: argparse.Namespace, _: dict[str, str]) -> int:
    from fewstep.common.distributed import World, choose_device
    from fewstep.playground.page import check_gradio, serve
    from fewstep.playground.shown import Playground

    check_gradio()  # before a model is loaded
    playground = Playground.open(args.model, choose_device(args.device, World()), args.variant)
    # SIGTERM ends it as Ctrl-C does, so that the pictures go with the page.
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
