"""`encode`: pictures and captions as what a latent model trains on."""

import argparse
import shlex
import sys

from fewstep.common.console import progress_bar, say_next


def run_encode(args: argparse.Namespace, _: dict[str, str]) -> int:
    from fewstep.common.distributed import environment
    from fewstep.data import Encoded
    from fewstep.runs.encode import encode, encoders_of

    again, is_main = shlex.join(["fewstep", *args.argv]), environment().is_main
    options = {name: getattr(args, name) for name in ("caption", "image", "label", "split", "config")}
    model = encoders_of(args.teacher, args.variant)
    with progress_bar("encoding", quiet=not (is_main and sys.stderr.isatty())) as progress:
        missing = encode(
            model,
            args.data,
            args.out,
            size=args.size,
            dtype=args.dtype,
            batch=args.batch,
            shard=args.shard,
            on_error=args.on_error,
            device=args.device,
            command=again,
            progress=progress,
            **{name: value for name, value in options.items() if value is not None},
        )
    if not is_main:
        return 0
    if missing:
        print(f"{args.out}: {missing} shards are still missing, which other processes encode")
        say_next([again])
        return 0
    data = Encoded(args.out)
    size = sum(file.stat().st_size for file in args.out.iterdir())
    said = f", {data.facts['captions']} captions" if data.texts is not None else ""
    left = data.facts["count"] - len(data)
    print(f"{args.out}: {len(data)} pictures{said}, {size / 1e6:.1f} MB{f'; {left} left out' if left else ''}")
    say_next([shlex.join(["fewstep", "distill", "--teacher", args.teacher, "--data", str(args.out)])])
    return 0
