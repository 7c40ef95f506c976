"""`cluster`: class labels for data that have none, by a model's own features."""

import argparse
import shlex
from pathlib import Path

from fewstep.commands.parser import Commands, add_command
from fewstep.commands.shared import MODEL, add_device, add_variant
from fewstep.common.console import say_next


def add(commands: Commands) -> None:
    p = add_command(
        commands,
        "cluster",
        run,
        "give data without labels the clusters of a model's own features as labels",
        examples=[
            "cluster runs/unlabelled --data photos --clusters 20 --out clustered.npz",
            "cluster ./my-ddpm --data '{name: photos, size: 32}' --clusters 100 --at 0.9 --out clustered.npz",
        ],
        may_run_code=True,
    )
    p.add_argument("model", help=MODEL)
    p.add_argument("--data", required=True, metavar="DATA", help="a data set by name or path, as in a recipe")
    p.add_argument("--clusters", type=int, required=True, metavar="N", help="how many")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="data and labels, a .npz file")
    p.add_argument("--at", type=float, default=0.85, metavar="T", help="time of the noise on the data (default: 0.85)")
    p.add_argument("--layer", metavar="NAME", help="a module of the network (default: the block in the middle)")
    p.add_argument("--attempts", type=int, default=8, metavar="N", help="starts of k-means (default: 8)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="decides noise and starts (default: 0)")
    p.set_defaults(teacher=False)
    add_variant(p)
    add_device(p)


def run(args: argparse.Namespace) -> int:
    from fewstep.commands.shared import open_model
    from fewstep.common.distributed import choose_device, environment
    from fewstep.common.options import parse_value
    from fewstep.flows.maps import FlowMap
    from fewstep.generation.clusters import cluster, write_labelled
    from fewstep.runs.datasets import data_of
    from fewstep.runs.recipe import Named

    if args.out.suffix != ".npz":
        raise ValueError(f"--out {args.out}: data and labels are written to one file, FILE.npz")
    model, _ = open_model(args)
    if isinstance(model, FlowMap):
        raise ValueError(f"{args.model} is a flow map: take the velocity field that it was made from")
    data = data_of(Named.model_validate(parse_value("data", args.data)), model)
    model.to(choose_device(args.device, environment()))
    options = {name: getattr(args, name) for name in ("at", "layer", "attempts", "seed")}
    found = cluster(model, data, args.clusters, **options)
    write_labelled(data, found.labels, args.out)
    sizes = found.sizes.tolist()
    print(f"{args.out}: {sum(sizes)} rows in {len(sizes)} clusters of {min(sizes)} to {max(sizes)}, by {found.layer}")
    if found.agreement is not None:
        print(f"normalised mutual information with the labels that the data have: {found.agreement:.3f}")
    drop = ["--drop", f"{{share: 0.1, null: {{class_labels: {len(sizes)}}}}}"]
    say_next([shlex.join(["fewstep", "train", "RECIPE", "--data", str(args.out), *drop])])
    return 0
