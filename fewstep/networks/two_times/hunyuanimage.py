"""A ``HunyuanImageTransformer2DModel``: how it is called, and it with a second time."""

from typing import Any

import torch
from diffusers import HunyuanImageTransformer2DModel
from torch import Tensor, nn

from ..channels import beside
from .rows import twice
from .transformer import TwoTimeTransformer, checkpoint_each


def call(
    model: Any,
    x: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    encoder_hidden_states_2: Tensor | None = None,
    encoder_attention_mask_2: Tensor | None = None,
    guidance: Tensor | None = None,
    image: Tensor | None = None,
    second: Tensor | None = None,
) -> Tensor:
    """A ``HunyuanImageTransformer2DModel`` on the state x (B, C, H, W); as it was distilled to few steps, from one
    timestep to the ``second``, the same if not given."""
    if second is None and model.config["use_meanflow"]:
        second = timestep

    def mask_of(text: Tensor | None, mask: Tensor | None) -> Tensor | None:
        return torch.ones(text.shape[:2], device=x.device) if mask is None and text is not None else mask

    return model(
        beside(model, x, image),
        timestep.to(x.dtype),
        encoder_hidden_states,
        mask_of(encoder_hidden_states, encoder_attention_mask),
        encoder_hidden_states_2=encoder_hidden_states_2,
        encoder_attention_mask_2=mask_of(encoder_hidden_states_2, encoder_attention_mask_2),
        guidance=None if guidance is None else guidance * 1000,
        timestep_r=None if second is None else second.to(x.dtype),
    ).sample


class TwoTimeHunyuanImageTransformer2DModel(TwoTimeTransformer, HunyuanImageTransformer2DModel):
    """A ``HunyuanImageTransformer2DModel``; one that takes a guidance of its own goes on doing so."""

    call = staticmethod(call)
    may_be_told = True

    def take_rows(self, late: bool, guided: int) -> None:
        embeddings: Any = self.time_guidance_embed
        self.embed_rows(embeddings, late, guided)
        # What refines the prompt is told the first time alone.
        self.context_embedder.register_forward_pre_hook(first_time, with_kwargs=True)
        if late:
            if embeddings.guidance_embedder is not None:
                embeddings.guidance_embedder.register_forward_hook(twice)
            blocks = [*self.transformer_blocks, *self.single_transformer_blocks]
            self.tell_late(blocks, self.norm_out, width=self.x_embedder.proj.out_channels)

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Any = None) -> None:
        checkpoint_blocks(self)


def checkpoint_blocks(model: Any) -> None:
    """Gradient checkpointing of a model with one time or two: diffusers' calls its function with keywords that it does
    not take."""
    checkpoint_each([*model.transformer_blocks, *model.single_transformer_blocks])


def first_time(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of rows of times the first, where they are the second argument."""
    states, times, *others = args
    return (states, times[:, 0].contiguous() if times.ndim == 2 else times, *others), kwargs
