"""The families of diffusers as networks of a field: ``net(x, timestep, **cond) -> prediction``, both (B, C, H, W).

Each wraps a model of diffusers and calls it as the pipelines of its family do. Timesteps (B,) are in the units of the
model's scheduler, 0 to 1000 mostly. Conditions keep the names of the model's own arguments, and the entries of
``added_cond_kwargs`` come as conditions of their own. Of a model that also predicts a variance, the mean is kept.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewstep.networks.unet import OfDiffusers, UNet, beside, mean_part

if TYPE_CHECKING:
    from diffusers import (
        DiTTransformer2DModel,
        FluxTransformer2DModel,
        PixArtTransformer2DModel,
        SD3Transformer2DModel,
        UNet2DConditionModel,
    )


class ConditionalUNet(OfDiffusers):
    """A ``UNet2DConditionModel``: Stable Diffusion 1 and 2, SDXL.

    Conditions: ``encoder_hidden_states`` (B, tokens, D) and ``encoder_attention_mask`` (B, tokens); ``class_labels``
    (B,); for SDXL ``text_embeds`` (B, D') and ``time_ids`` (B, 6); ``timestep_cond`` (B, D''); ``image`` (B, C', H, W)
    where its first convolution takes more channels than the state has.
    """

    def __init__(self, model: "UNet2DConditionModel") -> None:
        super().__init__(model)
        config = model.config
        blocks = (*config["down_block_types"], config["mid_block_type"] or "", *config["up_block_types"])
        self.needed = [
            *(["encoder_hidden_states"] if any("CrossAttn" in block for block in blocks) else []),
            *(["class_labels"] if model.class_embedding is not None else []),
            *(["text_embeds", "time_ids"] if config["addition_embed_type"] == "text_time" else []),
        ]

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        *,
        encoder_attention_mask: Tensor | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        text = {"encoder_hidden_states": encoder_hidden_states, "text_embeds": text_embeds, "time_ids": time_ids}
        given = {**text, "class_labels": class_labels}
        _need(self.model, **{name: given[name] for name in self.needed})
        added = {name: given[name] for name in ("text_embeds", "time_ids") if given[name] is not None}
        output = self.model(
            beside(self.model, x, image),
            timestep,
            encoder_hidden_states,
            class_labels=class_labels,
            timestep_cond=timestep_cond,
            added_cond_kwargs=added or None,
            encoder_attention_mask=encoder_attention_mask,
        )
        return mean_part(output.sample, x)


class DiT(OfDiffusers):
    """A ``DiTTransformer2DModel``: images by class. Condition: ``class_labels`` (B,), of which the one past the last
    class stands for none."""

    def __init__(self, model: "DiTTransformer2DModel") -> None:
        super().__init__(model)
        from diffusers.models.embeddings import LabelEmbedding

        # In training mode each block would drop labels by itself, drawn from torch's global generator: what is
        # dropped is for the data to say, once for all blocks.
        for module in model.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        _need(self.model, class_labels=class_labels)
        return mean_part(self.model(x, timestep, class_labels).sample, x)

    @property
    def classes(self) -> int:
        """How many ``class_labels`` it knows, without the one for none."""
        return self.model.config["num_embeds_ada_norm"]


class PixArt(OfDiffusers):
    """A ``PixArtTransformer2DModel``: PixArt-alpha and sigma.

    Conditions: ``encoder_hidden_states`` (B, tokens, D) and ``encoder_attention_mask`` (B, tokens); ``resolution``
    (B, 2) and ``aspect_ratio`` (B, 1) where the model was trained with them.
    """

    model: "PixArtTransformer2DModel"

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        encoder_attention_mask: Tensor | None = None,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
    ) -> Tensor:
        _need(self.model, encoder_hidden_states=encoder_hidden_states)
        if self.model.use_additional_conditions:
            _need(self.model, resolution=resolution, aspect_ratio=aspect_ratio)
        added: Any = {"resolution": resolution, "aspect_ratio": aspect_ratio}
        output = self.model(
            x,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            added_cond_kwargs=added,
            encoder_attention_mask=encoder_attention_mask,
        )
        return mean_part(output.sample, x)


class SD3(OfDiffusers):
    """An ``SD3Transformer2DModel``: Stable Diffusion 3. Conditions: ``encoder_hidden_states`` (B, tokens, D) and
    ``pooled_projections`` (B, D')."""

    model: "SD3Transformer2DModel"

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
    ) -> Tensor:
        _need(self.model, encoder_hidden_states=encoder_hidden_states, pooled_projections=pooled_projections)
        return self.model(x, encoder_hidden_states, pooled_projections, timestep).sample


class Flux(OfDiffusers):
    """A ``FluxTransformer2DModel`` on latents (B, C, H, W), which it sees as 2 x 2 patches.

    Conditions: ``encoder_hidden_states`` (B, tokens, D), ``pooled_projections`` (B, D'), and ``guidance`` (B,) where
    the model was distilled to take it.

    Args:
        size: height and width of the latents, which the model's config does not say; for ``shape`` alone.
    """

    def __init__(self, model: "FluxTransformer2DModel", size: int = 128) -> None:
        super().__init__(model)
        self.size = size

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        _need(self.model, encoder_hidden_states=encoder_hidden_states, pooled_projections=pooled_projections)
        takes_guidance = self.model.config["guidance_embeds"]
        if takes_guidance:
            _need(self.model, guidance=guidance)
        elif guidance is not None:
            raise ValueError("this FluxTransformer2DModel takes no guidance (B,), its config has no guidance_embeds")
        height, width = x.shape[-2:]
        if height % 2 or width % 2:
            raise ValueError(f"latents of {height} x {width} are not of 2 x 2 patches: even sides are needed")
        patches = pack(x)
        places = _places(height // 2, width // 2, x.device)
        output = self.model(
            patches,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            # The model multiplies it again, after the cast to its own type.
            timestep=timestep / 1000,
            img_ids=places,
            txt_ids=places.new_zeros(encoder_hidden_states.shape[1], 3),  # pyright: ignore[reportOptionalMemberAccess]
            guidance=guidance,
        )
        return unpack(output.sample, height, width)

    @property
    def shape(self) -> tuple[int, int, int]:
        """That of one sample, (C, H, W)."""
        return self.model.config["in_channels"] // 4, self.size, self.size


def pack(x: Tensor) -> Tensor:
    """Latents (B, C, H, W) as a row of 2 x 2 patches, (B, H W / 4, 4 C)."""
    rows, channels, height, width = x.shape
    patches = x.reshape(rows, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(rows, height * width // 4, 4 * channels)


def unpack(patches: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`pack`."""
    rows, _, channels = patches.shape
    grid = patches.reshape(rows, height // 2, width // 2, channels // 4, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(rows, channels // 4, height, width)


def _places(height: int, width: int, device: torch.device) -> Tensor:
    """Where each patch is: (height * width, 3), rows of (0, y, x)."""
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(-1, 3).float()


def _need(model: Any, **cond: Tensor | None) -> None:
    missing = [name for name, value in cond.items() if value is None]
    if missing:
        is_text = missing[0] not in ("class_labels", "guidance")
        raise ValueError(
            f"this {type(model).__name__} needs the condition {missing[0]}, one row a sample, and this call does not "
            f"have it: pass it{'; field.text.encode(prompts) makes the conditions of prompts' if is_text else ''}"
        )


# By the name of the class in diffusers.
FAMILIES: dict[str, type[Any]] = {
    "DiTTransformer2DModel": DiT,
    "FluxTransformer2DModel": Flux,
    "PixArtTransformer2DModel": PixArt,
    "SD3Transformer2DModel": SD3,
    "UNet2DConditionModel": ConditionalUNet,
    "UNet2DModel": UNet,
}
