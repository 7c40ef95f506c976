"""A ``UNet2DConditionModel`` as the network of a field, and of a flow map."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fewstep.networks.families.base import OfDiffusers, TwoTimeNetwork
from fewstep.networks.families.conditions import label_shape

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class ConditionalUNet(OfDiffusers):
    """A ``UNet2DConditionModel``: Stable Diffusion 1 and 2, SDXL, DeepFloyd IF, Kandinsky 2.2.

    Conditions: ``encoder_hidden_states`` (B, tokens, D) and ``encoder_attention_mask`` (B, tokens); ``class_labels``,
    numbers (B,), or vectors (B, D) where they are projected; for SDXL ``text_embeds`` (B, D') and ``time_ids`` (B, 6);
    for Kandinsky ``image_embeds`` (B, D'); ``timestep_cond`` (B, D''); ``image`` (B, C', H, W) where its first
    convolution takes more channels than the state has.
    """

    code = "unet2d_condition"
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
        return self.call(self.model, x, timestep, **told, **mask)

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
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


class TwoTimeConditionalUNet(TwoTimeNetwork, ConditionalUNet):
    """Of a ``UNet2DConditionModel``."""
