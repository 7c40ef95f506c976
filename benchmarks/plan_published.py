"""What the published models need to be distilled: plans of the shipped recipes.

    python benchmarks/plan_published.py                    # all four, as Markdown; and plans.json (or --out FILE)
    python benchmarks/plan_published.py --only sd15-itvm --training.gradient_checkpointing false

The last table has a row a model: what lies in memory throughout, rows at once on GPUs of 24, 48 and 80 GB (with more
keys of the recipe where they are needed), and an update on an H100 at 40 % of its peak.

The configurations are those that fewstep carries (fewstep/planning/published). No weights are needed.
"""

import sys
import time
from pathlib import Path
from typing import Any

import record
import torch

from fewstep.commands.plan import (
    duration,
    fit_table,
    memory_table,
    notes,
    number,
    size,
    time_table,
    title,
)
from fewstep.common.console import markdown
from fewstep.planning.plan import GPUS, plan
from fewstep.planning.weightless import teacher_without_weights
from fewstep.runs.recipes import load_recipe

# By recipe: the parameters of its teacher as published.
MODELS = {
    "sd15-itvm": 859_520_964,
    "sdxl-itvm": 2_567_463_684,
    "sd3-itvm-lora": 2_028_328_000,
    "flux-itvm-lora": 11_901_408_320,
}


def main(argv: list[str]) -> None:
    torch.set_num_threads(1)
    flags = {flag.removeprefix("--"): value for flag, value in zip(argv[::2], argv[1::2], strict=True)}
    out = Path(flags.pop("out", "plans.json"))
    names = [flags.pop("only")] if "only" in flags else list(MODELS)
    summary: list[list[Any]] = []
    for name in names:
        started = time.perf_counter()
        found = plan(load_recipe(name, flags))
        network = sum(p.numel() for p in teacher_without_weights(found.recipe).parameters())  # pyright: ignore
        if network != MODELS[name]:
            raise RuntimeError(f"{name}: {network:,} parameters, published with {MODELS[name]:,}")
        print(f"### {title(found)}\n")
        fits = fit_table(found)
        for table in (memory_table(found), fits, time_table(found, list(GPUS), 0.4)):
            print(f"{markdown(*table)}\n")
        print(f"{notes(found, 0.4)}\n")
        row = f"{number(found.flops / found.recipe.training.batch)}FLOP"
        update = duration(found.seconds(found.flops, "H100", 0.4))
        cards = ["-" if rows is None else f"{rows} {_extra(keys)}".strip() for _, rows, _, keys in fits[1]]
        some = [f"{millions / 1e6:,.0f} M" for millions in (network, found.trained)]
        summary.append([name, *some, size(found.fixed), *cards, row, update])
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    columns = ["recipe", "teacher", "train", "throughout", "24 GB", "48 GB", "80 GB", "a row", "an update, H100"]
    print(markdown(columns, summary))
    note = "Computed, not measured: times are operations over 40 % of the peak of the GPU. No seed is used."
    record.write(
        out,
        title="What the published models need to be distilled",
        columns=columns,
        rows=[[None if c == "-" else c for c in r] for r in summary],
        **record.here(notes=[note]),
    )


def _extra(keys: str) -> str:
    """What a recipe has to say more than how its batch is shared out."""
    words = keys.split()
    pairs = zip(words[::2], words[1::2], strict=True)
    kept = [f"`{key} {value}`" for key, value in pairs if key not in ("--training.accumulate", "--training.chunk")]
    return f"({', '.join(kept)})" if kept else ""


if __name__ == "__main__":
    main(sys.argv[1:])
