"""What steps of a training cost on a GPU at full width, and whether they hold what ``fewstep plan`` says they hold.

    python benchmarks/gpu_steps.py FOLDER                          # all models in all settings: under 10 minutes
    python benchmarks/gpu_steps.py FOLDER --models dit-xl --settings bf16
    python benchmarks/gpu_steps.py FOLDER --models dit-tiny --device cpu --rows 2 --steps 3    # to try the script

Random weights of published configurations, Stable Diffusion 1.5's U-Net and DiT-XL/2, distilled by ITVM. A setting is a
process; what was measured is kept in FOLDER and not measured again. Rows a second are the median of the steps after the
first few; memory is the most that torch held at once, beside what the plan counts without the context of CUDA.

Writes benchmarks/results/gpu-steps.json (--out).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from record import FOLDER, here, write

import fewstep
from fewstep.common.console import markdown
from fewstep.data.arrays import ArrayData
from fewstep.planning.plan import GIB, Plan, plan
from fewstep.planning.weightless import conditions
from fewstep.runs.recipes import load_recipe

ROOT = Path(__file__).resolve().parent.parent
SD15 = ROOT / "fewstep" / "planning" / "published" / "stable-diffusion-v1-5--stable-diffusion-v1-5"
# facebook/DiT-XL-2-256, and one to try the script with.
DIT: dict[str, Any] = {
    "activation_fn": "gelu-approximate", "attention_bias": True, "attention_head_dim": 72, "dropout": 0.0,
    "in_channels": 4, "norm_elementwise_affine": False, "norm_eps": 1e-5, "norm_num_groups": 32, "norm_type":
    "ada_norm_zero", "num_attention_heads": 16, "num_embeds_ada_norm": 1000, "num_layers": 28, "out_channels": 8,
    "patch_size": 2, "sample_size": 32,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, Any]] = {
    "sd15": ("unet", "UNet2DConditionModel", SD15 / "unet" / "config.json"),
    "dit-xl": ("transformer", "DiTTransformer2DModel", DIT),
    "dit-tiny": ("transformer", "DiTTransformer2DModel", {**DIT, "num_layers": 2, "num_attention_heads": 2}),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"precision": "bf16"},
    "bf16, compile": {"precision": "bf16", "compile": True},
    "bf16, checkpointing": {"precision": "bf16", "gradient_checkpointing": True},
    "bf16, compile, checkpointing": {"precision": "bf16", "compile": True, "gradient_checkpointing": True},
}
WARM = 5  # steps that are not timed: compilation and the choice of kernels are in them


def teacher_in(folder: Path, name: str) -> Path:
    """A diffusers folder with random weights and the scheduler that the configuration was published with."""
    import diffusers

    part, kind, config = MODELS[name]
    out = folder / name
    if not (out / "model_index.json").is_file():
        torch.manual_seed(0)
        facts = json.loads(config.read_text()) if isinstance(config, Path) else config
        getattr(diffusers, kind).from_config(facts).save_pretrained(out / part)
        betas: Any = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
        diffusers.DDIMScheduler(**(betas if part == "unet" else {})).save_pretrained(out / "scheduler")
        index = {"_class_name": "StableDiffusionPipeline" if part == "unet" else "DiTPipeline",
                 part: ["diffusers", kind], "scheduler": ["diffusers", "DDIMScheduler"]}  # fmt: skip
        (out / "model_index.json").write_text(json.dumps(index))
    return out


def planned(teacher: Path, setting: dict[str, Any], rows: int) -> Plan:
    told = {key: value for key, value in setting.items() if key != "compile"}
    training = {"steps": 10, "batch": rows, "chunk": rows, **told}
    tree = {"name": "steps", "teacher": str(teacher), "data": "nobody/latents", "objective": "ITVM"}
    return plan(load_recipe({**tree, "training": training}))


def measured(teacher: Path, setting: dict[str, Any], rows: int, steps: int, device: str) -> dict[str, float]:
    """Rows a second, and bytes: of the training as it ran, and as it was planned."""
    counted = planned(teacher, setting, rows)
    field: Any = fewstep.load(teacher)
    like = conditions(counted.recipe, field, rows, counted.shape)
    cond = {name: torch.randn(x.shape) if x.is_floating_point() else torch.zeros_like(x, device="cpu")
            for name, x in like.items()}  # fmt: skip
    data = ArrayData(torch.randn(rows, *counted.shape), cond)
    student = fewstep.FlowMap.from_field(field).requires_grad_(True)
    ends: list[float] = []

    def clock(_: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    fewstep.fit(student, fewstep.ITVM(field), data, WARM + steps, batch=rows, chunk=rows, device=device, lr=1e-5,
                callbacks=[clock], log_every=1000, quiet=True, **setting)  # fmt: skip
    each = [b - a for a, b in zip(ends[WARM - 1 :], ends[WARM:], strict=False)]
    held = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {"rows/s": rows / statistics.median(each), "held": held, "planned": counted.fixed + counted.passing(rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", default=["sd15", "dit-xl"], choices=list(MODELS))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=FOLDER / "gpu-steps.json")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    kept = args.folder / "measured.json"
    if args.one:
        (model,), (setting,) = args.models, args.settings
        found = measured(args.folder / model, SETTINGS[setting], args.rows, args.steps, args.device)
        known = json.loads(kept.read_text()) if kept.is_file() else {}
        kept.write_text(json.dumps({**known, f"{model}: {setting}": found}))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    failed, same = [], ["--rows", str(args.rows), "--steps", str(args.steps), "--device", args.device]
    for model in args.models:
        teacher_in(args.folder, model)
        for setting in args.settings:
            if kept.is_file() and f"{model}: {setting}" in json.loads(kept.read_text()):
                continue
            words = [str(args.folder), "--models", model, "--settings", setting, *same, "--one"]
            if subprocess.run([sys.executable, __file__, *words]).returncode:
                failed.append(f"{model} in {setting} did not run.")
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    rows: list[list[Any]] = []
    for name, found in known.items():
        model, _, setting = name.partition(": ")
        base = known.get(f"{model}: float32", found)
        speed, held, counted = found["rows/s"], found["held"] / GIB, found["planned"] / GIB
        rows.append([model, setting, speed, speed / base["rows/s"], held, counted, held / counted])
    columns = ["model", "setting", "rows/s", "of float32", "GiB held", "GiB planned", "held over planned"]
    formats = {"rows/s": "{:.1f}", **dict.fromkeys(columns[3:], "{:.2f}")}
    print(markdown(columns, [[*row[:2], *(f"{value:.2f}" for value in row[2:])] for row in rows]))
    note = f"ITVM on {args.rows} rows, all at once; medians of {args.steps} steps after {WARM}; random weights "
    notes = [note + "of published configurations. `of float32`: of rows a second.", *failed]
    write(args.out, title="Steps at full width", columns=columns, formats=formats, rows=rows, **here([0], notes))


if __name__ == "__main__":
    main()
