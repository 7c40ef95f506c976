"""`ui`: a page to try a model out."""

import argparse
from threading import Event

from fewstep.console import say


def run_ui(args: argparse.Namespace, _: dict[str, str]) -> int:
    from fewstep.playground import Playground
    from fewstep.playground_page import check_gradio, serve
    from fewstep.training.distributed import World, choose_device

    check_gradio()  # before a model is loaded
    playground = Playground.open(args.model, choose_device(args.device, World()))
    address, close = serve(playground, args.model, host=args.host, port=args.port)
    try:
        print(f"{address} shows {playground.name}; Ctrl-C ends it", flush=True)
        if args.host not in ("127.0.0.1", "localhost", "::1"):
            say(f"note: whoever reaches {args.host} can draw with it; there is no password")
        Event().wait()
    except KeyboardInterrupt:
        say("\nended")
    finally:
        close()
    return 0
