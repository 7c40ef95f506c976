"""Models from their configurations alone, on torch's ``meta`` device: shapes and types without numbers.

What a plan needs of a teacher and its data is known from the ``config.json`` of their folder. No weights are read, and
of a model on the hub none are fetched.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.common.errors import shown
from fewstep.common.model_files import read_json
from fewstep.flows.fields import DiffusionField
from fewstep.flows.guided import unguided
from fewstep.latents.prompts import TEXT_CONDITIONS
from fewstep.models.diffusers_configs import look_into
from fewstep.networks import OfDiffusers

META = torch.device("meta")
# Tokens that the pipelines with a large encoder cut a prompt to (the default of ``encode_prompt``).
LONGEST = {
    "AnyFlowPipeline": 512,
    "AuraFlowPipeline": 256,
    "ChromaPipeline": 512,
    "CogVideoXPipeline": 226,
    "Flux2KleinPipeline": 512,
    "Flux2Pipeline": 512,
    "FluxPipeline": 512,
    "HunyuanImagePipeline": 1000,
    "LTXPipeline": 128,
    "Lumina2Pipeline": 256,
    "PixArtAlphaPipeline": 120,
    "PixArtSigmaPipeline": 300,
    "QwenImagePipeline": 512,
    "SanaPipeline": 300,
    "StableDiffusion3Pipeline": 256,
    "WanPipeline": 512,
    "ZImagePipeline": 512,
}
# Behind those of its prompts, a Stable Audio has two that say where the sound begins and ends.
_MORE = {"StableAudioPipeline": 2}
_MOST_TOKENS = 1 << 16
# Tokens of a prompt, where no pipeline says how many its encoders make; of Stable Diffusion 3, of CLIP and T5 together.
_TOKENS = {
    "AnyFlowTransformer3DModel": 512,
    "AuraFlowTransformer2DModel": 256,
    "ChromaTransformer2DModel": 512,
    "CogVideoXTransformer3DModel": 226,
    "Flux2Transformer2DModel": 512,
    "FluxTransformer2DModel": 512,
    "HunyuanImageTransformer2DModel": 1000,
    "LTXVideoTransformer3DModel": 128,
    "Lumina2Transformer2DModel": 256,
    "PixArtTransformer2DModel": 120,
    "QwenImageTransformer2DModel": 512,
    "SD3Transformer2DModel": 333,
    "SanaTransformer2DModel": 300,
    "StableAudioDiTModel": 130,
    "UNet2DConditionModel": 77,
    "WanExpertsTransformer3DModel": 512,
    "WanTransformer3DModel": 512,
    "ZImageTransformer2DModel": 512,
}


def field_without_weights(folder: Path, variant: str | None = None) -> DiffusionField:
    """The model of a diffusers folder as ``fewstep.load`` makes it, its network on the meta device.

    Args:
        variant: of the weights of its VAE and text encoders.

    Raises:
        FileNotFoundError, ValueError: as ``fewstep.models.diffusers_configs.look_into``.
    """
    found = look_into(folder, variant)
    field = DiffusionField(found.network, found.scheduler)
    field.latents, field.text, field.distilled = found.latents, found.text, found.distilled
    return field.eval()


def text_conditions(model: Any, rows: int) -> dict[str, Tensor]:
    """What the text encoders of a model give for prompts, (rows, ...) on the meta device; nothing for a model without
    text."""
    cond = {name: numbers(rows, *shape) for name, shape in needed_shapes(model).items() if name in TEXT_CONDITIONS}
    if _class(model) == "PixArtTransformer2DModel":
        cond["encoder_attention_mask"] = torch.ones(rows, _tokens(model), dtype=torch.long, device=META)
    return cond


def needed_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """A row of each condition that a model of diffusers needs; nothing of another one."""
    network = getattr(unguided(model), "network", None)
    return network.condition_shapes(_tokens(model)) if isinstance(network, OfDiffusers) else {}


def _tokens(model: Any) -> int:
    """How many tokens a prompt is, by its pipeline's tokenizer and the length that ``encode_prompt`` cuts it to."""
    text = unguided(model).text
    if text is None:
        return _TOKENS.get(_class(model), 0)
    large, is_with_clip = LONGEST.get(text.pipeline), "StableDiffusion3" in text.pipeline
    if large is not None and not is_with_clip:
        return large
    file = text.folder / "tokenizer" / "tokenizer_config.json"
    clip = read_json(file).get("model_max_length", 77)
    if type(clip) is not int or not 0 < clip <= _MOST_TOKENS:
        raise ValueError(f"{file} has model_max_length {shown(clip)}, and a number of tokens is needed: fetch it again")
    return clip + (large or 0) + _MORE.get(text.pipeline, 0)


def _class(model: Any) -> str:
    """The class in diffusers that a model's network is of; nothing for another network."""
    inner = getattr(getattr(unguided(model), "network", None), "model", None)
    return type(inner).__name__.removeprefix("TwoTime")


def numbers(*shape: int) -> Tensor:
    return torch.empty(shape, device=META)
