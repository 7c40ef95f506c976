"""Tiny students of every family, and rows for them."""

from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, IPNDMScheduler
from torch import Tensor, nn

from fewstep.flows.fields import DiffusionField
from fewstep.networks import FAMILIES
from fewstep.networks.configs import experts
from toys.cosine import cosine_scheduler
from toys.families import MODELS, conditions, made, tiny_model
from toys.sounds import dance_model, stable_audio_model
from toys.unet import tiny_unet
from toys.videos import cogvideox_model

NAMES = [
    "unet",
    "unet of classes",
    *MODELS,
    "pixart of one size",
    "flux told",
    "flux2 told",
    "wan",
    "wan experts",
    "ltx",
    "stable audio",
    "dance",
    "cogvideox",
]

# They mix their time into something else, or hear it at one place: no block of theirs can be told another.
HEARD_ONCE = ("pixart", "chroma", "stable audio", "dance")


def network(name: str) -> Any:
    """The network of a field, with random weights."""
    match name:
        case "unet" | "unet of classes":
            model: Any = tiny_unet(classes=5 if "classes" in name else None, in_channels=4, out_channels=4)
        case "pixart of one size":
            model = tiny_model("pixart", use_additional_conditions=False, num_layers=3)
        case "flux told" | "flux2 told":
            model = tiny_model(name.split(" ")[0], guidance_embeds=True)
        case "wan" | "wan experts":
            options: Any = {
                "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
                "freq_dim": 16, "ffn_dim": 32, "num_layers": 3, "rope_max_seq_len": 32,
            }  # fmt: skip
            model, other = (made(diffusers.WanTransformer3DModel, seed, **options) for seed in (0, 1))
            model = experts(model, other, 500.0) if "experts" in name else model
        case "anyflow":
            model = made(
                diffusers.AnyFlowTransformer3DModel, num_attention_heads=2, attention_head_dim=12, in_channels=4,
                out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
            )  # fmt: skip
        case "ltx":
            model = made(
                diffusers.LTXVideoTransformer3DModel, num_attention_heads=2, attention_head_dim=8, in_channels=4,
                out_channels=4, cross_attention_dim=16, caption_channels=16, num_layers=3,
            )  # fmt: skip
        case "stable audio":
            model = stable_audio_model()
        case "cogvideox":
            sides = {"sample_width": 8, "sample_height": 8, "sample_frames": 9}
            model = cogvideox_model(text_embed_dim=16, max_text_seq_length=8, num_layers=3, **sides)
        case "dance":
            model = dance_model()
        case _:
            model = tiny_model(name)
    return FAMILIES[type(model).__name__](model)


def rows(name: str, count: int = 2) -> tuple[Tensor, dict[str, Tensor]]:
    """A state and its conditions."""
    draw = torch.Generator().manual_seed(5)
    shape = (4, 3, 8, 8) if name in ("wan", "wan experts", "ltx", "cogvideox") else (4, 8, 8)
    known = {"unet": {}, "unet of classes": {"class_labels": torch.arange(count) % 5}}
    prompt = {"encoder_hidden_states": torch.randn(count, 8, 16, generator=draw)}
    known["dance"] = {}
    known |= {"wan": prompt, "wan experts": prompt, "ltx": prompt, "cogvideox": prompt}
    if name == "dance":
        shape = (2, 16)
    if name == "stable audio":
        shape, known[name] = (4, 8), {**prompt, "global_hidden_states": torch.randn(count, 1, 32, generator=draw)}
    cond = known[name] if name in known else conditions(name.split(" ")[0], count)
    if name == "pixart of one size":
        cond = {"encoder_hidden_states": cond["encoder_hidden_states"]}
    if name.endswith(" told"):
        cond["guidance"] = torch.tensor([3.5, 1.0])[:count]
    return torch.randn(count, *shape, generator=draw), cond


def field_of(name: str) -> DiffusionField:
    own: dict[str, Any] = {"stable audio": cosine_scheduler(), "dance": IPNDMScheduler()}
    return DiffusionField(network(name), own.get(name) or FlowMatchEulerDiscreteScheduler())


S, T = torch.tensor([100.0, 730.0]), torch.tensor([50.0, 20.0])


def loud(student: nn.Module) -> nn.Module:
    """With no layer of zeros, as after training."""
    for weight in student.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(2))
    return student
