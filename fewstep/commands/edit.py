"""`edit`: pictures of your own changed by a model."""

import argparse
from pathlib import Path
from typing import Any

from fewstep.commands.parser import Commands, add_command
from fewstep.commands.shared import MODEL, add_device, add_guidance_scale, add_variant, open_model, size_of
from fewstep.common.console import say


def add(commands: Commands) -> None:
    p = add_command(
        commands,
        "edit",
        run,
        "change pictures of your own by a model",
        examples=[
            "edit fewstep:fashion-mnist-fast shoe.png --from-label Sneaker --label 'Ankle boot'",
            'edit ./fast-sd photos --source-prompt "a cat" --prompt "a dog" --strength 0.8 --out dogs',
        ],
        may_run_code=True,
    )
    p.add_argument("model", help=MODEL)
    p.add_argument("pictures", nargs="+", help="files, or folders of them, in any form that Pillow reads")
    text = "flow-edit (default: from one condition to another), sdedit (noise over it) or invert (back to its noise)"
    p.add_argument("--method", default="flow-edit", metavar="NAME", help=text)
    text = "what the pictures are to be: classes by number or name, in turn"
    p.add_argument("--label", metavar="3,cat", help=text)
    p.add_argument("--from-label", metavar="5,dog", help="what they are; sdedit asks for none")
    text = "the same for a model of text; once, or for each picture in turn"
    p.add_argument("--prompt", action="append", default=[], metavar="TEXT", help=text)
    text = "what they are in words (default: no prompt)"
    p.add_argument("--source-prompt", action="append", default=[], metavar="TEXT", help=text)
    add_guidance_scale(p)
    text = "the same for what they are (default: as the model is; 1, none, inverts best)"
    p.add_argument("--source-guidance-scale", type=float, metavar="W", help=text)
    text = "above 0 (all is kept) to 1 (begins at noise) (default: flow-edit 0.7, sdedit 0.5, invert 1)"
    p.add_argument("--strength", type=float, metavar="S", help=text)
    p.add_argument("--steps", type=int, metavar="N", help="(default: 4 for a flow map, 28 for a velocity field)")
    text = "draws of the noise that each step of flow-edit is averaged over (default: 1)"
    p.add_argument("--average", type=int, default=1, metavar="N", help=text)
    text = "refuse an inversion that comes back no nearer than this, root mean square of -1 to 1 (default: say it)"
    p.add_argument("--tolerance", type=float, metavar="R", help=text)
    p.add_argument("--size", metavar="768x1024", help="height and width in pixels, for a model that takes others")
    text = "a .png, .npy, .npz, or a new folder (default: edited.png of one, the folder edited of several)"
    p.add_argument("--out", type=Path, metavar="PATH", help=text)
    p.add_argument("--seed", type=int, default=0, metavar="N", help="decides the noise (default: 0)")
    p.add_argument("--batch", type=int, default=64, metavar="N", help="pictures edited at once, at most (default: 64)")
    p.add_argument("--teacher", action="store_true", help="edit by the teacher of the run instead")
    p.add_argument("--dtype", default="float32", metavar="NAME", help="of the network: float32, bf16, or fp16 on a GPU")
    add_variant(p)
    add_device(p)


def run(args: argparse.Namespace) -> int:
    import torch

    from fewstep.common.distributed import World, choose_device
    from fewstep.flows.calls import count_calls
    from fewstep.flows.maps import FlowMap
    from fewstep.flows.signature import shape_of, sized
    from fewstep.generation.edits import Told, edit_batches, picture_files, read_pictures, settle
    from fewstep.generation.images import check_out, save_pictures, write
    from fewstep.generation.placement import place

    files = picture_files(args.pictures)
    out = args.out or Path("edited.png" if len(files) == 1 else "edited")
    device = choose_device(args.device, World())
    model, run = open_model(args)
    size, own = size_of(args.size) if args.size else None, None if run is None else run.shape
    shape = (own or shape_of(model)) if size is None else sized(model, own, size)
    written = shape if model.latents is None else model.latents.image_shape_of(shape)
    target = Told(_classes(model, "--label", args.label), args.prompt, args.guidance_scale)
    source = Told(_classes(model, "--from-label", args.from_label), args.source_prompt, args.source_guidance_scale)
    if args.method != "flow-edit" and args.average != 1:
        raise ValueError(f"--average {args.average}: flow-edit alone takes an average over its noise")
    if args.method != "invert" and args.tolerance is not None:
        raise ValueError(f"--tolerance {args.tolerance:g}: {args.method} inverts nothing; --method invert does")
    model = place(model, device, args.dtype)
    model, wanted, told = settle(model, args.method, len(files), args.seed, target, source)
    pixels, note = read_pictures(files, written)
    check_out(out, written)
    steps = args.steps if args.steps is not None else 4 if isinstance(model, FlowMap) else 28
    batches = edit_batches(
        model,
        pixels,
        args.method,
        steps,
        wanted,
        told,
        strength=args.strength,
        guidance=(target.guidance, source.guidance),
        average=args.average,
        tolerance=args.tolerance,
        size=size,
        batch=args.batch,
    )
    if note:
        say(f"note: {note}")
    names = _names(files)
    parts, residuals = [], []
    with count_calls(model) as calls:
        for rows, images, residual in batches:
            residuals += [] if residual is None else [residual]
            if out.suffix in ("", ".png") and (out.suffix == "" or len(files) == 1):
                save_pictures(images, [out / names[i] if out.suffix == "" else out for i in rows])
            else:
                parts.append(images)
    if parts:
        write(torch.cat(parts), {}, out)
    said = f"{len(files)} pictures" if len(files) > 1 else str(files[0])
    print(f"{out}: {said} edited by {args.method}, {calls.rows / len(files):g} network calls each")
    if residuals:
        residual = torch.cat(residuals)
        worst = int(residual.nan_to_num(torch.inf).argmax())
        mean, most = float(residual.mean()), float(residual[worst])
        print(f"from the noise that was found the model comes back to within {mean:.2g} (root mean square of -1 to 1)")
        if len(files) > 1:
            print(f"the worst is {files[worst]}: {most:.2g}")
    return 0


def _classes(model: Any, flag: str, text: str | None) -> list[int]:
    """The numbers of the classes of a flag."""
    from fewstep.generation.requests import class_names, class_numbers, class_words

    return class_numbers(class_words(flag, text), class_names(model))


def _names(files: list[Path]) -> list[str]:
    """A name for each picture in a folder of PNGs: its own, and a number where two are called alike."""
    names: list[str] = []
    for file in files:
        name, number = f"{file.stem}.png", 2
        while name.lower() in {taken.lower() for taken in names}:
            name, number = f"{file.stem}-{number}.png", number + 1
        names.append(name)
    return names
