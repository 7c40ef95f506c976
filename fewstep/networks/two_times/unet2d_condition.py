"""A ``UNet2DConditionModel``: how it is called, and it with a second time."""

from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor

from ..channels import beside, mean_part
from .labelled_times import LabelledTimes
from .rows import twice


def call(
    model: Any,
    x: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor | None = None,
    class_labels: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    text_embeds: Tensor | None = None,
    time_ids: Tensor | None = None,
    image_embeds: Tensor | None = None,
    timestep_cond: Tensor | None = None,
    image: Tensor | None = None,
) -> Tensor:
    """A ``UNet2DConditionModel`` on the state x (B, C, H, W)."""
    added = {"text_embeds": text_embeds, "time_ids": time_ids, "image_embeds": image_embeds}
    output = model(
        beside(model, x, image),
        timestep,
        encoder_hidden_states,
        class_labels=class_labels,
        timestep_cond=timestep_cond,
        added_cond_kwargs={name: value for name, value in added.items() if value is not None} or None,
        encoder_attention_mask=encoder_attention_mask,
    )
    return mean_part(output.sample, x)


class TwoTimeUNet2DConditionModel(LabelledTimes, UNet2DConditionModel):
    """A ``UNet2DConditionModel``."""

    call = staticmethod(call)

    def take_rows(self, late: bool, guided: int) -> None:
        if late and self.config["time_cond_proj_dim"] is not None:
            raise ValueError("second_time: late, and this U-Net takes a timestep_cond with its time: say t")
        super().take_rows(late, guided)
        if late and hasattr(self, "add_embedding"):  # which is added to both times' embeddings
            self.add_embedding.register_forward_hook(twice)
