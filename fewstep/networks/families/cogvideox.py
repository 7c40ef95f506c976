"""A ``CogVideoXTransformer3DModel`` as the network of a field, and of a flow map."""

from typing import TYPE_CHECKING

from torch import Tensor

from fewstep.networks.families.base import OfDiffusers, TwoTimeNetwork

if TYPE_CHECKING:
    from diffusers import CogVideoXTransformer3DModel


class CogVideoX(OfDiffusers):
    """A ``CogVideoXTransformer3DModel`` on latents of videos (B, C, F, H, W). Conditions: ``encoder_hidden_states``
    (B, tokens, D), and ``image`` (B, C', F, H, W) where it takes more channels than the state has.
    """

    code, first = "cogvideox", "patch_embed.proj"
    model: "CogVideoXTransformer3DModel"

    @property
    def shape(self) -> tuple[int, ...]:
        """That of one video, (C, F, H, W). Its config counts frames as they are before the VAE."""
        config = self.model.config
        frames, step = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1, config["patch_size_t"]
        frames = -(-frames // step) * step if step else frames
        return self.channels, frames, config["sample_height"], config["sample_width"]

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        self.need(encoder_hidden_states=encoder_hidden_states)
        return self.call(self.model, x, timestep, encoder_hidden_states, image)

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        config = self.model.config
        is_counted = not config["use_rotary_positional_embeddings"] or config["use_learned_positional_embeddings"]
        # Where the places of tokens are in a table, there are as many as that has.
        return {
            "encoder_hidden_states": (config["max_text_seq_length"] if is_counted else tokens, config["text_embed_dim"])
        }


class TwoTimeCogVideoX(TwoTimeNetwork, CogVideoX):
    """Of a ``CogVideoXTransformer3DModel``."""
