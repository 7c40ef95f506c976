"""A ``ChromaTransformer2DModel``: how it is called, and it with a second time."""

from typing import Any

import torch
from diffusers import ChromaTransformer2DModel
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.transformers.transformer_chroma import ChromaCombinedTimestepTextProjEmbeddings
from torch import Tensor, nn

from ..channels import beside
from .patches import pack, places, unpack
from .rows import at_random
from .transformer import TwoTimeTransformer, checkpoint_each


def call(
    model: Any,
    x: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    image: Tensor | None = None,
) -> Tensor:
    """A ``ChromaTransformer2DModel`` on the state x (B, C, H, W), which it sees as 2 x 2 patches."""
    height, width = x.shape[-2:]
    patches = pack(beside(model, x, image, patch=4))
    assert encoder_hidden_states is not None
    mask = encoder_attention_mask
    if mask is not None:  # it wants one over the patches too
        mask = torch.cat([mask.to(patches), patches.new_ones(patches.shape[:2])], dim=1)
    output = model(
        patches,
        encoder_hidden_states=encoder_hidden_states,
        # The model multiplies it again, after the cast to its own type.
        timestep=timestep / 1000,
        img_ids=places(height, width, x.device),
        txt_ids=torch.zeros(encoder_hidden_states.shape[1], 3, device=x.device),
        attention_mask=mask,
    )
    return unpack(output.sample, height, width)


class TwoTimeChromaTransformer2DModel(TwoTimeTransformer, ChromaTransformer2DModel):
    """A ``ChromaTransformer2DModel``, a small network of which makes what all its blocks are told of the time."""

    call = staticmethod(call)

    def take_rows(self, late: bool, guided: int) -> None:
        if late:
            raise ValueError("second_time: late, and one network makes what all blocks of a Chroma are told: say t")
        approximator: Any = self.distilled_guidance_layer
        approximator.in_proj = RowsIn(approximator.in_proj, self.time_text_embed, guided)
        self.time_text_embed = FirstAndRows(self.time_text_embed)

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Any = None) -> None:
        checkpoint_blocks(self)


def checkpoint_blocks(model: Any) -> None:
    """Gradient checkpointing of a model with one time or two: with diffusers' the single blocks lose the mask."""
    checkpoint_each([*model.transformer_blocks, *model.single_transformer_blocks])


class FirstAndRows(ChromaCombinedTimestepTextProjEmbeddings):
    """What a Chroma tells its small network of a time (B,), and behind it the sines and cosines of what else is in rows
    of times (B, k): (B, M, C), and (B, M, C + (k - 1) C')."""

    def __init__(self, base: Any) -> None:
        nn.Module.__init__(self)
        self.time_proj, self.guidance_proj = base.time_proj, base.guidance_proj
        self.register_buffer("mod_proj", base.mod_proj, persistent=False)

    def forward(self, timestep: Tensor) -> Tensor:
        if timestep.ndim == 1:
            return super().forward(timestep)
        first, others = super().forward(timestep[:, 0].contiguous()), timestep[:, 1:]
        told = self.time_proj(others.flatten()).to(first.dtype).view(len(first), 1, -1)
        return torch.cat([first, told.expand(-1, first.shape[1], -1)], dim=-1)


class RowsIn(nn.Module):
    """The first layer of the small network of a Chroma, and beside it embeddings of the other times in a row."""

    def __init__(self, layer: nn.Linear, embed: Any, guided: int) -> None:
        super().__init__()
        self.weight, self.bias, self.in_features = layer.weight, layer.bias, layer.in_features
        self.told = embed.time_proj.num_channels
        more = (TimestepEmbedding(self.told, layer.out_features) for _ in range(1 + guided))
        self.second, *others = more
        self.of_guidance = nn.ModuleList(others)

    @property
    def new(self) -> list[Any]:
        """What the model did not have before."""
        return [self.second, *self.of_guidance]

    @property
    def like(self) -> dict[str, Tensor]:
        """The weights that what is new starts from: its own, at random, as the model embeds no time by itself."""
        return at_random(lambda: TimestepEmbedding(self.told, self.weight.shape[0]), self.weight)

    def forward(self, told: Tensor) -> Tensor:
        # In memory of its own, as in rows of diffusers: matrix products may round otherwise where rows lie apart.
        hidden = nn.functional.linear(told[..., : self.in_features].contiguous(), self.weight, self.bias)
        if told.shape[-1] == self.in_features:
            return hidden
        for embed, number in zip(self.new, told[:, :1, self.in_features :].split(self.told, dim=-1), strict=True):
            hidden = hidden + embed(number)
        return hidden
