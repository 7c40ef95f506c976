"""Prompts as conditions of a network, made by the ``encode_prompt`` of the pipeline of diffusers that they belong to.

It is part of the ``pipeline.py`` of an export, so it needs torch and diffusers alone, and transformers for the text
encoders.
"""

import inspect
from typing import Any

from torch import Tensor

# What `encode_prompt` of a pipeline returns, in its order, as conditions of the network; None for what is not needed.
RETURNED: dict[str, tuple[str | None, ...]] = {
    "FluxPipeline": ("encoder_hidden_states", "pooled_projections", None),
    "PixArtAlphaPipeline": ("encoder_hidden_states", "encoder_attention_mask", None, None),
    "PixArtSigmaPipeline": ("encoder_hidden_states", "encoder_attention_mask", None, None),
    "StableDiffusion3Pipeline": ("encoder_hidden_states", None, "pooled_projections", None),
    "StableDiffusionPipeline": ("encoder_hidden_states", None),
    "StableDiffusionXLPipeline": ("encoder_hidden_states", None, "text_embeds", None),
}
# The parts that encode, by their names in every pipeline.
ENCODERS = [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]


def encode(pipeline: str, parts: dict[str, Any], prompts: list[str], device: Any) -> dict[str, Tensor]:
    """The conditions of prompts, a row each, as the pipeline of this name makes them of these parts."""
    import diffusers  # here, as the table above is read where nothing is encoded

    kind = getattr(diffusers, pipeline)
    taken = inspect.signature(kind.__init__).parameters.values()
    own = {p.name: parts.get(p.name) for p in taken if p.default is p.empty and p.name != "self"}
    safety = {"requires_safety_checker": False} if "safety_checker" in own else {}
    made = kind(**{**own, **safety, "scheduler": None})
    options = {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False}
    known = inspect.signature(kind.encode_prompt).parameters
    options = {key: value for key, value in options.items() if key in known}
    returned = made.encode_prompt(prompts, device=device, num_images_per_prompt=1, **options)
    return {key: value for key, value in zip(RETURNED[pipeline], returned, strict=True) if key is not None}
