"""What the published models need to be distilled: plans of the shipped recipes on folders of configurations alone.

    python benchmarks/plan_published.py                    # all four, as Markdown; and plans.json (or --out FILE)
    python benchmarks/plan_published.py --only sd15-itvm --training.gradient_checkpointing false

The last table has a row a model: what lies in memory throughout, rows at once on GPUs of 24, 48 and 80 GB (with more
keys of the recipe where they are needed), and an update on an H100 at 40 % of its peak.

The configurations are those that the models were published with, as far as they decide shapes. No weights are needed.
"""

import json
import sys
import tempfile
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

VAE = {"_class_name": "AutoencoderKL", "latent_channels": 4, "block_out_channels": [128, 256, 512, 512]}
SCHEDULE = {
    "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
CLIP, CLIP_G, T5 = ["transformers", "CLIPTextModel"], ["transformers", "CLIPTextModelWithProjection"], [
    "transformers", "T5EncoderModel",
]  # fmt: skip
CLIP_TOKENS, T5_TOKENS = ["transformers", "CLIPTokenizer"], ["transformers", "T5TokenizerFast"]

# By recipe: the folder of the model in a pipeline, its config, its parameters as published, and the other parts.
MODELS: dict[str, tuple[str, dict[str, Any], int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "sd15-itvm": (
        "unet",
        {"_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        859_520_964,
        SCHEDULE,
        VAE,
        {"_class_name": "StableDiffusionPipeline", "text_encoder": CLIP, "tokenizer": CLIP_TOKENS},
    ),
    "sdxl-itvm": (
        "unet",
        {
            "_class_name": "UNet2DConditionModel", "sample_size": 128, "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816, "use_linear_projection": True,
        },
        2_567_463_684,
        SCHEDULE,
        VAE,
        {
            "_class_name": "StableDiffusionXLPipeline", "text_encoder": CLIP, "text_encoder_2": CLIP_G,
            "tokenizer": CLIP_TOKENS, "tokenizer_2": CLIP_TOKENS,
        },
    ),
    "sd3-itvm-lora": (
        "transformer",
        {
            "_class_name": "SD3Transformer2DModel", "sample_size": 128, "in_channels": 16, "out_channels": 16,
            "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "joint_attention_dim": 4096,
            "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
        },
        2_028_328_000,
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        {**VAE, "latent_channels": 16},
        {
            "_class_name": "StableDiffusion3Pipeline", "text_encoder": CLIP_G, "text_encoder_2": CLIP_G,
            "text_encoder_3": T5, "tokenizer": CLIP_TOKENS, "tokenizer_2": CLIP_TOKENS, "tokenizer_3": T5_TOKENS,
        },
    ),
    "flux-itvm-lora": (
        "transformer",
        {
            "_class_name": "FluxTransformer2DModel", "in_channels": 64, "num_layers": 19, "num_single_layers": 38,
            "num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 4096,
            "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": [16, 56, 56],
        },
        11_901_408_320,
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": True},
        {**VAE, "latent_channels": 16},
        {
            "_class_name": "FluxPipeline", "text_encoder": CLIP, "text_encoder_2": T5, "tokenizer": CLIP_TOKENS,
            "tokenizer_2": T5_TOKENS,
        },
    ),
}  # fmt: skip


def write(name: str, folder: Path) -> Path:
    """The folder of a published model with its configurations and nothing else."""
    part, config, _, scheduler, vae, index = MODELS[name]
    library = {part: ["diffusers", config["_class_name"]], "vae": ["diffusers", "AutoencoderKL"]}
    files = {
        f"{part}/config.json": config,
        "scheduler/scheduler_config.json": scheduler,
        "vae/config.json": vae,
        "tokenizer/tokenizer_config.json": {"model_max_length": 77},
        "model_index.json": {**index, **library, "scheduler": ["diffusers", scheduler["_class_name"]]},
    }
    for file, content in files.items():
        path = folder / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return folder / name


def main(argv: list[str]) -> None:
    torch.set_num_threads(1)
    flags = {flag.removeprefix("--"): value for flag, value in zip(argv[::2], argv[1::2], strict=True)}
    out = Path(flags.pop("out", "plans.json"))
    names = [flags.pop("only")] if "only" in flags else list(MODELS)
    summary: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            started = time.perf_counter()
            source = write(name, Path(folder))
            found = plan(load_recipe(name, {"teacher.source": str(source), **flags}))
            network = sum(p.numel() for p in teacher_without_weights(found.recipe).parameters())  # pyright: ignore
            if network != MODELS[name][2]:
                raise RuntimeError(f"{name}: {network:,} parameters, published with {MODELS[name][2]:,}")
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
