"""Prompts as conditions of a network, made by the ``encode_prompt`` of the pipeline of diffusers that they belong to.

It is part of the ``pipeline.py`` of an export, so it needs torch and diffusers alone, and transformers for the text
encoders.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

_TEXT, _MASK = "encoder_hidden_states", "encoder_attention_mask"
# What `encode_prompt` of a pipeline returns, in its order, as conditions of the network; None for what is not needed.
RETURNED: dict[str, tuple[str | None, ...]] = {
    "AnyFlowPipeline": (_TEXT, None),
    "AuraFlowPipeline": (_TEXT, None, None, None),
    "ChromaPipeline": (_TEXT, None, _MASK, None, None, None),
    "CogVideoXPipeline": (_TEXT, None),
    "Flux2KleinPipeline": (_TEXT, None),
    "Flux2Pipeline": (_TEXT, None),
    "FluxPipeline": (_TEXT, "pooled_projections", None),
    "HunyuanImagePipeline": (_TEXT, _MASK, f"{_TEXT}_2", f"{_MASK}_2"),
    "LTXPipeline": (_TEXT, _MASK, None, None),
    "Lumina2Pipeline": (_TEXT, _MASK, None, None),
    "PixArtAlphaPipeline": (_TEXT, _MASK, None, None),
    "PixArtSigmaPipeline": (_TEXT, _MASK, None, None),
    "QwenImagePipeline": (_TEXT, f"{_TEXT}_mask"),
    "SanaPipeline": (_TEXT, _MASK, None, None),
    "StableAudioPipeline": (_TEXT, "global_hidden_states"),
    "StableDiffusion3Pipeline": (_TEXT, None, "pooled_projections", None),
    "StableDiffusionPipeline": (_TEXT, None),
    "StableDiffusionXLPipeline": (_TEXT, None, "text_embeds", None),
    "WanPipeline": (_TEXT, None),
    "ZImagePipeline": (_TEXT, _MASK),
}
# Those that encode no prompt otherwise than an empty one, and those whose prompts are as long as they are: here all are
# brought to so many tokens, and a mask says which count.
_OWN_NULL = ("Lumina2Pipeline", "SanaPipeline")
_PADDED = {"QwenImagePipeline": 512, "ZImagePipeline": 512}
# The parts that encode, by their names in every pipeline.
ENCODERS = [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
# That of Stable Audio brings text and seconds to one width.
PROJECTION = "projection_model"
ENCODERS += [PROJECTION]


def encode_prompts(
    pipeline: str,
    parts: dict[str, Any],
    prompts: list[str] | None,
    device: Any,
    seconds: tuple[float, float] | None = None,
) -> dict[str, Tensor]:
    """The conditions of prompts, a row each, as the pipeline of this name makes them of these parts; for None one row,
    of no prompt, as it takes them for guidance.

    Args:
        seconds: where sound begins and ends.
    """
    made = stock_pipeline(pipeline, parts)
    kind = type(made)
    texts, is_own = prompts or [""], prompts is None and pipeline in _OWN_NULL
    options: dict[str, Any] = {"prompt_2": None, "prompt_3": None, "batch_size": len(texts)}
    options |= {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": is_own}
    called, known = inspect.signature(kind.__call__).parameters, inspect.signature(kind.encode_prompt).parameters
    told = ("max_sequence_length", "complex_human_instruction", "system_prompt")
    options |= {name: called[name].default for name in told if name in called}
    returned = made.encode_prompt(list(texts), **{key: value for key, value in options.items() if key in known})
    if isinstance(returned, Tensor):
        if seconds is None:
            raise ValueError(f"a {pipeline} is told where sound begins and ends: its rate is needed, as its VAE has it")
        return _of_sound(made, returned, prompts is None, seconds)
    names = RETURNED[pipeline]
    if is_own:
        returned = returned[2:]
    if pipeline in _PADDED:
        returned = _padded(*returned, length=_PADDED[pipeline])
    return {key: value for key, value in zip(names, returned, strict=False) if key is not None}


def _of_sound(made: Any, text: Tensor, is_null: bool, seconds: tuple[float, float]) -> dict[str, Tensor]:
    """The conditions of a Stable Audio: of text (B, tokens, D), and of where the sound begins and ends. For guidance it
    takes zeros where those of the text are, and its seconds as they are."""
    begin, end = made.encode_duration(*seconds, text.device, False, len(text))
    tokens = torch.cat([text, begin, end], dim=1)
    if is_null:
        return {_TEXT: torch.zeros_like(tokens)}
    return {_TEXT: tokens, "global_hidden_states": torch.cat([begin, end], dim=2)}


def stock_pipeline(name: str, parts: dict[str, Any]) -> Any:
    """The pipeline of diffusers of this name, around parts that it does not copy; without a scheduler."""
    import diffusers  # here, as the table above is read where nothing is encoded

    kind = getattr(diffusers, name)
    taken = inspect.signature(kind.__init__).parameters.values()
    own = {p.name: parts.get(p.name) for p in taken if p.default is p.empty and p.name != "self"}
    safety = {"requires_safety_checker": False} if "safety_checker" in own else {}
    return kind(**{**own, **safety, "scheduler": None})


def _padded(text: Any, mask: Any, length: int) -> tuple[Tensor, Tensor]:
    """Prompts (B, tokens, D), or a list of them, in as many tokens, and which of these count."""
    rows = list(text)
    if mask is not None and isinstance(text, Tensor):
        rows = [one[keep.bool()] for one, keep in zip(text, mask, strict=True)]
    room = [one.new_zeros(length - len(one), one.shape[1]) for one in rows]
    counts = torch.tensor([len(one) for one in rows], device=rows[0].device)
    masks = (torch.arange(length, device=counts.device) < counts[:, None]).long()
    return torch.stack([torch.cat(pair) for pair in zip(rows, room, strict=True)]), masks
