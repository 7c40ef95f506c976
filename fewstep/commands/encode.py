"""`encode`: images and captions as what a latent model trains on."""

import argparse
import shlex
import sys
from pathlib import Path

from fewstep.commands.parser import Commands, add_command
from fewstep.commands.shared import add_device, add_engine, add_variant
from fewstep.common.console import progress_bar, say_next


def add(commands: Commands) -> None:
    p = add_command(
        commands,
        "encode",
        run,
        "encode images and captions for a latent model, once",
        examples=[
            "encode --teacher ./stable-diffusion --data photos --out photos-encoded",
            "encode --teacher ./sdxl --data photos --size 1024 --buckets --out photos-encoded",
            "encode --teacher ./DiT-XL-2-256 --data train-{0000..0099}.tar --size 256 --out encoded",
        ],
        may_run_code=True,
    )
    p.add_argument("--teacher", required=True, metavar="MODEL", help="what they are for: a diffusers folder or a run")
    text = (
        "a folder of images (captions in its metadata.jsonl), hf:NAME, a folder of save_to_disk, or webdataset "
        "shards: a folder, a .tar, train-{0000..0099}.tar, or such behind https:// or hf://datasets/"
    )
    p.add_argument("--data", required=True, metavar="DATA", help=text)
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to; goes on with what is there")
    p.add_argument("--size", type=int, metavar="N", help="side of the images in pixels (default: the model's)")
    text = "keep their shapes: cut each to one of several sizes, all of about the area of N x N (default: squares)"
    p.add_argument("--buckets", action="store_true", help=text)
    p.add_argument("--bucket-step", type=int, metavar="N", help="with --buckets: what their sides are multiples of")
    p.add_argument("--small", metavar="DO", help="with --buckets: images smaller than theirs: enlarge (default), drop")
    p.add_argument("--dtype", default="float16", metavar="NAME", help="float16 (default), bfloat16 or float32")
    p.add_argument("--batch", type=int, default=16, metavar="N", help="images encoded at once (default: 16)")
    p.add_argument("--shard", type=int, metavar="N", help="images in a file (default: about 256 MB)")
    p.add_argument("--caption", metavar="COLUMN", help="that of the captions (default: text, caption or prompt)")
    p.add_argument("--image", metavar="COLUMN", help="of a Hugging Face data set, that of the images")
    p.add_argument("--label", metavar="COLUMN", help="of a Hugging Face data set, that of the classes")
    p.add_argument("--split", metavar="NAME", help="of a Hugging Face data set (default: train)")
    p.add_argument("--config", metavar="NAME", help="of a Hugging Face data set")
    p.add_argument("--keep", type=int, metavar="N", help="of shards behind addresses, so many on the disk (default: 4)")
    p.add_argument("--on-error", default="raise", metavar="DO", help="with a bad image: raise (default) or skip")
    add_engine(p)
    add_variant(p)
    add_device(p)


def run(args: argparse.Namespace) -> int:
    from fewstep.common.distributed import environment
    from fewstep.data import Encoded
    from fewstep.runs.encode import encode

    again, is_main = shlex.join(["fewstep", *args.argv]), environment().is_main
    options = {name: getattr(args, name) for name in ("caption", "image", "label", "split", "config", "keep")}
    with progress_bar("encoding", quiet=not (is_main and sys.stderr.isatty())) as progress:
        missing = encode(
            args.teacher,
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
            variant=args.variant,
            engine=args.engine,
            workers=args.workers,
            buckets=args.buckets,
            bucket_step=args.bucket_step,
            small=args.small or "enlarge",
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
    shapes = "" if data.buckets is None else f" in {len(data.buckets)} buckets"
    left = data.facts["count"] - len(data)
    print(f"{args.out}: {len(data)} images{shapes}{said}, {size / 1e6:.1f} MB{f'; {left} left out' if left else ''}")
    say_next([shlex.join(["fewstep", "distill", "--teacher", args.teacher, "--data", str(args.out)])])
    return 0
