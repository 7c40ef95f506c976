"""A ``ChromaTransformer2DModel`` as the network of a field, and of a flow map."""

from typing import TYPE_CHECKING

from torch import Tensor

from fewstep.networks.families.base import Sized, TwoTimeNetwork

if TYPE_CHECKING:
    from diffusers import ChromaTransformer2DModel


class Chroma(Sized):
    """A ``ChromaTransformer2DModel`` on latents (B, C, H, W), which it sees as 2 x 2 patches.

    Conditions: ``encoder_hidden_states`` (B, tokens, D), and ``encoder_attention_mask`` (B, tokens), 0 where a token is
    padding (one padding token counts, as its pipeline has it); ``image`` (B, C', H, W) where it takes more channels
    than the state has.
    """

    code, first, patch = "chroma", "x_embedder", 4
    usual = 128
    model: "ChromaTransformer2DModel"

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        self.need(encoder_hidden_states=encoder_hidden_states)
        return self.call(self.model, x, timestep, encoder_hidden_states, encoder_attention_mask, image)

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (tokens, self.model.config["joint_attention_dim"])}


class TwoTimeChroma(TwoTimeNetwork, Chroma):
    """Of a ``ChromaTransformer2DModel``."""
