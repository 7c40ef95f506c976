"""A ``Flux2Transformer2DModel`` as the network of a field, and of a flow map."""

from typing import TYPE_CHECKING

from torch import Tensor

from fewstep.networks.families.base import Sized, TwoTimeNetwork
from fewstep.networks.families.conditions import own_guidance

if TYPE_CHECKING:
    from diffusers import Flux2Transformer2DModel


class Flux2(Sized):
    """A ``Flux2Transformer2DModel`` (dev, klein) on latents (B, C, H, W), each place of which is a token: its VAE makes
    32 channels, whose 2 x 2 patches are the state's 128.

    Conditions: ``encoder_hidden_states`` (B, tokens, D), ``guidance`` (B,) where the model was distilled to take it,
    and ``image`` (B, C', H, W) where it takes more channels than the state has.
    """

    code, first = "flux2", "x_embedder"
    usual = 64
    model: "Flux2Transformer2DModel"

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        guidance: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        self.need(encoder_hidden_states=encoder_hidden_states, guidance=guidance)
        self.check_guidance(guidance)
        return self.call(self.model, x, timestep, encoder_hidden_states, guidance, image)

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (tokens, self.model.config["joint_attention_dim"]), **own_guidance(self.model)}


class TwoTimeFlux2(TwoTimeNetwork, Flux2):
    """Of a ``Flux2Transformer2DModel``."""
