"""A ``FluxTransformer2DModel`` as the network of a field, and of a flow map."""

from typing import TYPE_CHECKING

from torch import Tensor

from fewstep.networks.families.base import Sized, TwoTimeNetwork
from fewstep.networks.families.conditions import own_guidance, text_and_pooled

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel


class Flux(Sized):
    """A ``FluxTransformer2DModel`` on latents (B, C, H, W), which it sees as 2 x 2 patches.

    Conditions: ``encoder_hidden_states`` (B, tokens, D), ``pooled_projections`` (B, D'), ``guidance`` (B,) where the
    model was distilled to take it, and ``image`` (B, C', H, W) where it takes more channels than the state has.
    """

    code, first, patch = "flux", "x_embedder", 4
    usual = 128
    model: "FluxTransformer2DModel"

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        guidance: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        text = {"encoder_hidden_states": encoder_hidden_states, "pooled_projections": pooled_projections}
        self.need(**text, guidance=guidance)
        self.check_guidance(guidance)
        return self.call(self.model, x, timestep, **text, guidance=guidance, image=image)

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        return {**text_and_pooled(self.model, tokens), **own_guidance(self.model)}


class TwoTimeFlux(TwoTimeNetwork, Flux):
    """Of a ``FluxTransformer2DModel``."""
