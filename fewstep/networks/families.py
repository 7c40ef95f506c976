"""The families of diffusers as networks of a field: ``net(x, timestep, **cond) -> prediction``, both (B, C, H, W).

Each wraps a model of diffusers and calls it as the pipelines of its family do. Timesteps (B,) are in the units of the
model's scheduler, 0 to 1000 mostly. Conditions keep the names of the model's own arguments, and the entries of
``added_cond_kwargs`` come as conditions of their own. Of a model that also predicts a variance, the mean is kept.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fewstep.networks.calls import call_conditional_unet, call_dit, call_flux, call_pixart, call_sd3, call_wan
from fewstep.networks.unet import OfDiffusers, UNet, label_shape

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
    """A ``UNet2DConditionModel``: Stable Diffusion 1 and 2, SDXL, DeepFloyd IF, Kandinsky 2.2.

    Conditions: ``encoder_hidden_states`` (B, tokens, D) and ``encoder_attention_mask`` (B, tokens); ``class_labels``,
    numbers (B,), or vectors (B, D) where they are projected; for SDXL ``text_embeds`` (B, D') and ``time_ids`` (B, 6);
    for Kandinsky ``image_embeds`` (B, D'); ``timestep_cond`` (B, D''); ``image`` (B, C', H, W) where its first
    convolution takes more channels than the state has.
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
        image_embeds: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        added = {"text_embeds": text_embeds, "time_ids": time_ids, "image_embeds": image_embeds}
        told = {"encoder_hidden_states": encoder_hidden_states, "class_labels": class_labels, **added}
        self.need(**told)
        mask = {"encoder_attention_mask": encoder_attention_mask, "timestep_cond": timestep_cond, "image": image}
        return call_conditional_unet(self.model, x, timestep, **told, **mask)

    def told(self, tokens: int) -> dict[str, tuple[int, ...]]:
        config: Any = self.model.config
        cross = config["cross_attention_dim"]
        cross = cross if isinstance(cross, int) else cross[0]
        width, shapes = config["encoder_hid_dim"] or cross, label_shape(self.model)
        blocks = (*config["down_block_types"], config["mid_block_type"] or "", *config["up_block_types"])
        adds_text = config["addition_embed_type"] in ("text", "text_image")
        if config["encoder_hid_dim_type"] == "image_proj":  # the attention is to the image alone
            shapes["image_embeds"] = (width,)
        elif adds_text or any("CrossAttn" in block for block in blocks):
            shapes["encoder_hidden_states"] = (tokens, width)
        match config["addition_embed_type"]:
            case "text_time":
                sizes = 6 * config["addition_time_embed_dim"]
                shapes["text_embeds"] = (config["projection_class_embeddings_input_dim"] - sizes,)
                shapes["time_ids"] = (6,)
            case "text_image":
                shapes |= {"text_embeds": (cross,), "image_embeds": (cross,)}
            case "image":
                shapes["image_embeds"] = (width,)
        if config["encoder_hid_dim_type"] == "text_image_proj":
            shapes["image_embeds"] = (cross,)
        return shapes


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

    def told(self, tokens: int) -> dict[str, tuple[int, ...]]:
        return {"class_labels": ()}


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

    def told(self, tokens: int) -> dict[str, tuple[int, ...]]:
        config = self.model.config
        width = config["caption_channels"] or config["cross_attention_dim"]
        sizes = {"resolution": (2,), "aspect_ratio": (1,)} if self.model.use_additional_conditions else {}
        return {"encoder_hidden_states": (tokens, width), **sizes}


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
        self.need(encoder_hidden_states=encoder_hidden_states, pooled_projections=pooled_projections)
        return call_sd3(self.model, x, timestep, encoder_hidden_states, pooled_projections)

    def told(self, tokens: int) -> dict[str, tuple[int, ...]]:
        return text_and_pooled(self.model, tokens)


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

    def told(self, tokens: int) -> dict[str, tuple[int, ...]]:
        guidance = {"guidance": ()} if self.model.config["guidance_embeds"] else {}
        return {**text_and_pooled(self.model, tokens), **guidance}

    @property
    def channels(self) -> int:
        return self.model.config["in_channels"] // 4

    @property
    def image_channels(self) -> int:
        return 0

    @property
    def shape(self) -> tuple[int, ...]:
        """That of one sample, (C, H, W)."""
        return self.channels, self.size, self.size


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

    def told(self, tokens: int) -> dict[str, tuple[int, ...]]:
        config = self.model.config
        image = {} if config["image_dim"] is None else {"encoder_hidden_states_image": (257, config["image_dim"])}
        return {"encoder_hidden_states": (tokens, config["text_dim"]), **image}

    @property
    def channels(self) -> int:
        return self.model.config["out_channels"]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of one sample, (C, F, H, W)."""
        return self.channels, *self.size


def text_and_pooled(model: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    """What the models of joint attention are told of a prompt: its tokens, and a vector of it all."""
    config = model.config
    text, pooled = (tokens, config["joint_attention_dim"]), (config["pooled_projection_dim"],)
    return {"encoder_hidden_states": text, "pooled_projections": pooled}


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
