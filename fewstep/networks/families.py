"""The families of diffusers as networks of a field: ``net(x, timestep, **cond) -> prediction``, both (B, C, H, W).

Each wraps a model of diffusers and calls it as the pipelines of its family do. Timesteps (B,) are in the units of the
model's scheduler, 0 to 1000 mostly. Conditions keep the names of the model's own arguments, and the entries of
``added_cond_kwargs`` come as conditions of their own. Of a model that also predicts a variance, the mean is kept.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fewstep.networks.calls import call_conditional_unet, call_dit, call_flux, call_pixart, call_sd3, call_wan
from fewstep.networks.unet import OfDiffusers, UNet

if TYPE_CHECKING:
    from diffusers import (
        DiTTransformer2DModel,
        FluxTransformer2DModel,
        PixArtTransformer2DModel,
        SD3Transformer2DModel,
        UNet2DConditionModel,
        WanTransformer3DModel,
    )


class ConditionalUNet(OfDiffusers):
    """A ``UNet2DConditionModel``: Stable Diffusion 1 and 2, SDXL.

    Conditions: ``encoder_hidden_states`` (B, tokens, D) and ``encoder_attention_mask`` (B, tokens); ``class_labels``
    (B,); for SDXL ``text_embeds`` (B, D') and ``time_ids`` (B, 6); ``timestep_cond`` (B, D''); ``image`` (B, C', H, W)
    where its first convolution takes more channels than the state has.
    """

    model: "UNet2DConditionModel"

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
        self.need(**text, class_labels=class_labels)
        mask = {"encoder_attention_mask": encoder_attention_mask, "timestep_cond": timestep_cond, "image": image}
        return call_conditional_unet(self.model, x, timestep, **text, **mask, class_labels=class_labels)

    @property
    def needed(self) -> list[str]:
        config = self.model.config
        blocks = (*config["down_block_types"], config["mid_block_type"] or "", *config["up_block_types"])
        is_labelled = config["num_class_embeds"] is not None or config["class_embed_type"] not in (None, "timestep")
        return [
            *(["encoder_hidden_states"] if any("CrossAttn" in block for block in blocks) else []),
            *(["class_labels"] if is_labelled else []),
            *(["text_embeds", "time_ids"] if config["addition_embed_type"] == "text_time" else []),
        ]


class DiT(OfDiffusers):
    """A ``DiTTransformer2DModel``: images by class. Condition: ``class_labels`` (B,), of which the one past the last
    class stands for none."""

    model: "DiTTransformer2DModel"

    def __init__(self, model: "DiTTransformer2DModel") -> None:
        super().__init__(model)
        from diffusers.models.embeddings import LabelEmbedding

        # In training mode each block would drop labels by itself, drawn from torch's global generator: what is
        # dropped is for the data to say, once for all blocks.
        for module in model.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        self.need(class_labels=class_labels)
        return call_dit(self.model, x, timestep, class_labels)

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
        self.need(encoder_hidden_states=encoder_hidden_states, resolution=resolution, aspect_ratio=aspect_ratio)
        told = {"resolution": resolution, "aspect_ratio": aspect_ratio}
        return call_pixart(self.model, x, timestep, encoder_hidden_states, encoder_attention_mask, **told)

    @property
    def needed(self) -> list[str]:
        told = ["resolution", "aspect_ratio"] if self.model.use_additional_conditions else []
        return ["encoder_hidden_states", *told]


class SD3(OfDiffusers):
    """An ``SD3Transformer2DModel``: Stable Diffusion 3. Conditions: ``encoder_hidden_states`` (B, tokens, D) and
    ``pooled_projections`` (B, D')."""

    model: "SD3Transformer2DModel"
    needed = ("encoder_hidden_states", "pooled_projections")  # pyright: ignore

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
    ) -> Tensor:
        self.need(encoder_hidden_states=encoder_hidden_states, pooled_projections=pooled_projections)
        return call_sd3(self.model, x, timestep, encoder_hidden_states, pooled_projections)


class Flux(OfDiffusers):
    """A ``FluxTransformer2DModel`` on latents (B, C, H, W), which it sees as 2 x 2 patches.

    Conditions: ``encoder_hidden_states`` (B, tokens, D), ``pooled_projections`` (B, D'), and ``guidance`` (B,) where
    the model was distilled to take it.

    Args:
        size: height and width of the latents, which the model's config does not say; for ``shape`` alone.
    """

    model: "FluxTransformer2DModel"

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
        text = {"encoder_hidden_states": encoder_hidden_states, "pooled_projections": pooled_projections}
        self.need(**text, guidance=guidance)
        if guidance is not None and not self.takes_guidance:
            raise ValueError("this FluxTransformer2DModel takes no guidance (B,), its config has no guidance_embeds")
        return call_flux(self.model, x, timestep, **text, guidance=guidance)

    @property
    def takes_guidance(self) -> bool:
        return self.model.config["guidance_embeds"]

    @property
    def needed(self) -> list[str]:
        guidance = ["guidance"] if self.model.config["guidance_embeds"] else []
        return ["encoder_hidden_states", "pooled_projections", *guidance]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of one sample, (C, H, W)."""
        return self.model.config["in_channels"] // 4, self.size, self.size


class Wan(OfDiffusers):
    """A ``WanTransformer3DModel``: videos (B, C, F, H, W). Conditions: ``encoder_hidden_states`` (B, tokens, D), and
    ``encoder_hidden_states_image`` (B, tokens, D') where the model was trained with an image.

    Args:
        size: frames, height and width of the latents, which the model's config does not say; for ``shape`` alone.
    """

    model: "WanTransformer3DModel"

    def __init__(self, model: "WanTransformer3DModel", size: tuple[int, int, int] = (21, 60, 104)) -> None:
        super().__init__(model)
        self.size = size

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_image: Tensor | None = None,
    ) -> Tensor:
        text = {"encoder_hidden_states": encoder_hidden_states}
        self.need(**text, encoder_hidden_states_image=encoder_hidden_states_image)
        return call_wan(self.model, x, timestep, **text, encoder_hidden_states_image=encoder_hidden_states_image)

    @property
    def needed(self) -> list[str]:
        image = ["encoder_hidden_states_image"] if self.model.config["image_dim"] is not None else []
        return ["encoder_hidden_states", *image]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of one sample, (C, F, H, W)."""
        return self.model.config["out_channels"], *self.size


# By the name of the class in diffusers.
FAMILIES: dict[str, type[Any]] = {
    "DiTTransformer2DModel": DiT,
    "FluxTransformer2DModel": Flux,
    "PixArtTransformer2DModel": PixArt,
    "SD3Transformer2DModel": SD3,
    "UNet2DConditionModel": ConditionalUNet,
    "UNet2DModel": UNet,
    "WanTransformer3DModel": Wan,
}
