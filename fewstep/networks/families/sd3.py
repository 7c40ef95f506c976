"""An ``SD3Transformer2DModel`` as the network of a field, and of a flow map."""

from typing import TYPE_CHECKING

from torch import Tensor

from fewstep.networks.families.base import OfDiffusers, TwoTimeNetwork
from fewstep.networks.families.conditions import text_and_pooled

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel


class SD3(OfDiffusers):
    """An ``SD3Transformer2DModel``: Stable Diffusion 3. Conditions: ``encoder_hidden_states`` (B, tokens, D) and
    ``pooled_projections`` (B, D'); ``image`` (B, C', H, W) where it takes more channels than the state has."""

    code, first = "sd3", "pos_embed.proj"
    names_sigmas = False
    model: "SD3Transformer2DModel"

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        self.need(encoder_hidden_states=encoder_hidden_states, pooled_projections=pooled_projections)
        return self.call(self.model, x, timestep, encoder_hidden_states, pooled_projections, image)

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        return text_and_pooled(self.model, tokens)


class TwoTimeSD3(TwoTimeNetwork, SD3):
    """Of an ``SD3Transformer2DModel``."""
