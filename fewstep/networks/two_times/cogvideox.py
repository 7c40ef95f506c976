"""A ``CogVideoXTransformer3DModel``: how it is called, and it with a second time."""

from typing import Any

from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor

from ..channels import beside
from .rows import RowEmbedding, RowProjection, twice
from .transformer import TwoTimeTransformer

# What its pipelines tell those that are made for an image of how it stands to the video.
_OFFSET = 2.0


def call(
    model: Any,
    x: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor | None = None,
    image: Tensor | None = None,
) -> Tensor:
    """A ``CogVideoXTransformer3DModel`` on the state x (B, C, F, H, W), a video; it wants the frames before C."""
    config = model.config
    told: dict[str, Any] = {}
    if config["use_rotary_positional_embeddings"]:
        told["image_rotary_emb"] = _turns(config, x)
    if config.get("ofs_embed_dim"):
        told["ofs"] = timestep.new_full((1,), _OFFSET)
    both = beside(model, x, image).transpose(1, 2)
    return model(both, encoder_hidden_states, timestep, **told).sample.transpose(1, 2)


def _turns(config: Any, x: Tensor) -> Any:
    """The rotary embedding of the places of a video, as ``CogVideoXPipeline`` has it."""
    frames, *sides = x.shape[2:]
    patch, patch_t = config["patch_size"], config["patch_size_t"]
    grid, base = (
        tuple(side // patch for side in sides),
        (config["sample_height"] // patch, config["sample_width"] // patch),
    )
    options: dict[str, Any] = {"embed_dim": config["attention_head_dim"], "grid_size": grid, "device": x.device}
    if patch_t is None:
        return get_3d_rotary_pos_embed(crops_coords=_crop(grid, base), temporal_size=frames, **options)
    frames = (frames + patch_t - 1) // patch_t
    return get_3d_rotary_pos_embed(crops_coords=None, temporal_size=frames, grid_type="slice", max_size=base, **options)


def _crop(grid: tuple[int, ...], base: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The region of a base grid (height, width) that one of other sides covers, in its middle."""
    (height, width), (most_high, most_wide) = grid, base
    if height / width > most_high / most_wide:
        high, wide = most_high, round(most_high / height * width)
    else:
        high, wide = round(most_wide / width * height), most_wide
    top, left = round((most_high - high) / 2.0), round((most_wide - wide) / 2.0)
    return (top, left), (top + high, left + wide)


class TwoTimeCogVideoXTransformer3DModel(TwoTimeTransformer, CogVideoXTransformer3DModel):
    """A ``CogVideoXTransformer3DModel``."""

    call = staticmethod(call)

    def take_rows(self, late: bool, guided: int) -> None:
        model: Any = self
        model.time_proj = RowProjection(model.time_proj)
        model.time_embedding = RowEmbedding(model.time_embedding, late, guided)
        if late:
            if model.ofs_embedding is not None:
                model.ofs_embedding.register_forward_hook(twice)
            width = model.config["time_embed_dim"]
            self.tell_late(list(model.transformer_blocks), model.norm_out, width=width)
