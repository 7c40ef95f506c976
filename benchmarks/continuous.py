"""A U-Net of differential equations against one of blocks: equal parameters, equal CPU seconds, then equal updates.

    python benchmarks/continuous.py FOLDER                # three seeds, kept in FOLDER; 20 minutes of a core
    python benchmarks/continuous.py FOLDER --seeds        # the table alone, of what FOLDER has

The 8 x 8 digits, FlowMatching, batches of 64. The blocks are diffusers' ``UNet2DModel`` of the recipe digits-teacher,
a quarter as large; the equations a ``ContinuousUNet`` of 24 and 36 channels. Both have attention at 4 x 4, and as many
parameters to a hundredth. An update is timed first, both in turn, in CPU seconds; ``--seconds`` over that is how many a
network gets. Judged are 1000 samples of 20 Euler steps.

Writes benchmarks/results/continuous.json (--out).
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from record import FOLDER, here, write
from small_digits import FIT, digits, judge_of, quality
from torch.utils.data import TensorDataset

import fewstep
from fewstep.data.batch import Batch
from fewstep.evaluation.cost import compare_costs
from fewstep.networks import ContinuousUNet, UNet
from fewstep.planning.counting import count_call

WAYS = {  # the solver's steps (0 for blocks), and whether it gets the seconds or the updates of the blocks
    "blocks": (0, "seconds"),
    "equations, 1 step": (1, "seconds"),
    "equations, 2 steps": (2, "seconds"),
    "equations, 1 step, as many updates": (1, "updates"),
}
CALLS = 20
METRICS = ("fd", "accuracy")


def network(steps: int) -> Any:
    if steps:
        return ContinuousUNet((1, 8, 8), (24, 36), steps=steps, classes=10)
    from diffusers import UNet2DModel

    return UNet(
        UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8, attention_head_dim=16, num_class_embeds=10,
        )
    )  # fmt: skip


def field(steps: int) -> fewstep.NetworkField:
    if steps:
        return fewstep.NetworkField(network(steps))
    from fewstep.flows.paths import Reversed

    return fewstep.NetworkField(network(0), Reversed(1000.0), "flow", path=fewstep.Linear())


def costs() -> dict[int, float]:
    """CPU seconds of an update of 64 rows, without the optimizer, by the solver's steps."""
    rows, labels = digits()
    entries = {str(n): (field(n), fewstep.FlowMatching(times="logit-normal"), None) for n in (0, 1, 2)}
    found = compare_costs(entries, Batch(rows[:64], {"class_labels": labels[:64]}), rounds=15)
    return {int(name): cost.seconds for name, cost in found.items()}


def operations(steps: int) -> int:
    """Those of a call on one row."""
    model = field(steps).to("meta")
    labels = torch.zeros(1, dtype=torch.long, device="meta")
    return count_call(model, torch.empty(1, 1, 8, 8, device="meta"), (0.5,), {"class_labels": labels})


def judged(way: str, seed: int, cost: dict[int, float], seconds: float, judge: Any, lr: float) -> dict[str, Any]:
    steps, given = WAYS[way]
    rows, labels = digits()
    torch.manual_seed(seed)
    model = field(steps)
    updates = round(seconds / cost[steps if given == "seconds" else 0])
    data = TensorDataset(rows, labels)
    objective = fewstep.FlowMatching(times="logit-normal")
    trained: Any = fewstep.fit(model, objective, data, updates, seed=seed, lr=lr, **FIT).ema
    found: dict[str, Any] = {"way": way, "seed": seed, "updates": updates, "cost": cost[steps]}
    found |= quality(trained, rows, labels, judge, (CALLS,))[str(CALLS)]
    if given == "updates":  # the same weights by finer steps
        for stage in (*trained.network.down, *trained.network.up):
            stage.steps = 4
        found["solved finer"] = quality(trained, rows, labels, judge, (CALLS,))[str(CALLS)]
    return found


def table(folder: Path, out: Path, seconds: float) -> None:
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*-[0-9].json"))]
    rows: list[list[Any]] = []
    for way, (steps, _) in WAYS.items():
        mine = [one for one in found if one["way"] == way]
        parameters = sum(p.numel() for p in network(steps).parameters())
        facts = [parameters, f"{operations(steps) / 1e6:.1f}", f"{1e3 * mine[0]['cost']:.0f}", mine[0]["updates"]]
        rows.append([way, *facts, *(spread([one[metric] for one in mine]) for metric in METRICS)])
        if "solved finer" in mine[0]:
            finer = [spread([one["solved finer"][metric] for one in mine]) for metric in METRICS]
            rows.append(
                ["the same, sampled with 4 steps", parameters, f"{operations(4) / 1e6:.1f}", None, None, *finer]
            )
    write(
        out,
        title="A U-Net of differential equations against one of blocks",
        formats=dict.fromkeys(METRICS, "{mean} ± {std}"),
        columns=["network", "parameters", "MFLOPs a call", "ms an update", "updates", *METRICS],
        rows=rows,
        **here(
            sorted({one["seed"] for one in found}),
            [
                f"Each network gets {seconds:g} CPU seconds of updates of 64 rows; one gets the updates of the blocks.",
                f"fd and accuracy are by a small classifier, of 1,000 samples of {CALLS} calls.",
            ],
        ),
    )


def spread(values: list[float]) -> dict[str, Any]:
    mean = f"{statistics.mean(values):.3g}"
    return {"mean": float(mean), "std": float(f"{statistics.stdev(values):.2g}") if len(values) > 1 else 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--out", type=Path, default=FOLDER / "continuous.json")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.seeds:
        timed = args.folder / "costs.json"
        if not timed.is_file():
            timed.write_text(json.dumps(costs()))
        cost = {int(steps): seconds for steps, seconds in json.loads(timed.read_text()).items()}
        print(cost, flush=True)
        judge = judge_of(*digits())
        for seed in args.seeds:
            for way in WAYS:
                file = args.folder / f"{way.replace(', ', '-').replace(' ', '-')}-{seed}.json"
                if not file.is_file():
                    file.write_text(json.dumps(judged(way, seed, cost, args.seconds, judge, args.lr)))
                    print(file.read_text(), flush=True)
    table(args.folder, args.out, args.seconds)


if __name__ == "__main__":
    main()
