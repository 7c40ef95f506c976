"""A ``FluxTransformer2DModel`` as the network of a field, and of a flow map."""

from typing import TYPE_CHECKING

from torch import Tensor

from fewstep.networks.families.base import OfDiffusers, TwoTimeNetwork
from fewstep.networks.families.conditions import text_and_pooled

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel


class Flux(OfDiffusers):
    """A ``FluxTransformer2DModel`` on latents (B, C, H, W), which it sees as 2 x 2 patches.

    Conditions: ``encoder_hidden_states`` (B, tokens, D), ``pooled_projections`` (B, D'), ``guidance`` (B,) where the
    model was distilled to take it, and ``image`` (B, C', H, W) where it takes more channels than the state has.

    Args:
        size: height and width of the latents, which the model's config does not say; for ``shape`` alone.
    """

    code, first, patch = "flux", "x_embedder", 4
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
        image: Tensor | None = None,
    ) -> Tensor:
        text = {"encoder_hidden_states": encoder_hidden_states, "pooled_projections": pooled_projections}
        self.need(**text, guidance=guidance)
        self.check_guidance(guidance)
        return self.call(self.model, x, timestep, **text, guidance=guidance, image=image)

    @property
    def takes_guidance(self) -> bool:
        return self.model.config["guidance_embeds"]

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        guidance = {"guidance": ()} if self.model.config["guidance_embeds"] else {}
        return {**text_and_pooled(self.model, tokens), **guidance}

    @property
    def shape(self) -> tuple[int, ...]:
        """That of one sample, (C, H, W)."""
        return self.channels, self.size, self.size


class TwoTimeFlux(TwoTimeNetwork, Flux):
    """Of a ``FluxTransformer2DModel``."""
