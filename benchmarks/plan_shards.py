"""What each of 1 to 16 GPUs needs to distil published models with all their weights, sharded: plans.

    python benchmarks/plan_shards.py                              # plan-shards.json (or --out FILE)
    python benchmarks/plan_shards.py --only Qwen/Qwen-Image --training.offload true

A row a model: GiB of each GPU, everything counted, and what one of 8 GPUs sends in an update.

ITVM with two copies of the student, bf16 autocast, gradient checkpointing, 64 rows an update, 4 at once on a GPU. The
configurations are those that fewstep carries (fewstep/planning/published). No weights are needed.
"""

import sys
from pathlib import Path
from typing import Any

import record
import torch

from fewstep.commands.plan import SHARED_BY, size
from fewstep.common.console import markdown
from fewstep.planning.plan import GIB, plan
from fewstep.runs.recipes import load_recipe

MODELS = (
    "stabilityai/stable-diffusion-xl-base-1.0",
    "black-forest-labs/FLUX.1-dev",
    "Qwen/Qwen-Image",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers",
)
TRAINING = {"steps": 10_000, "batch": 64, "chunk": 4, "accumulate": 16, "precision": "bf16", "shard": "fsdp2"}


def main(argv: list[str]) -> None:
    torch.set_num_threads(1)
    flags = {flag.removeprefix("--"): value for flag, value in zip(argv[::2], argv[1::2], strict=True)}
    out = Path(flags.pop("out", "plan-shards.json"))
    only = flags.pop("only", None)
    rows: list[list[Any]] = []
    for name in MODELS if only is None else (only,):
        recipe = {"name": "sharded", "teacher": name, "data": "./pictures", "objective": "ITVM"}
        recipe["training"] = {**TRAINING, "gradient_checkpointing": True}
        found = plan(load_recipe(recipe, flags))
        each: list[Any] = []
        for gpus in SHARED_BY:
            at_once = found.rows_of(gpus)
            each.append(None if at_once is None else f"{found.sharded_total(gpus, at_once) / GIB:.1f}")
        sent = size(found.sent(8, found.rows_of(8) or 1))
        rows.append([name.partition("/")[2], f"{found.parameters / 1e6:,.0f} M", *each, sent])
        print(f"{name}: {rows[-1]}", file=sys.stderr, flush=True)
    columns = ["model", "student", *(f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in SHARED_BY), "sent, 8 GPUs"]
    print(markdown(columns, rows))
    note = "Computed, not measured: GiB of each GPU with four rows at once. No seed is used."
    record.write(
        out,
        title="What each of several GPUs needs to distil published models, sharded",
        columns=columns,
        rows=rows,
        **record.here(notes=[note]),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
