"""An ``AuraFlowTransformer2DModel`` as the network of a field, and of a flow map."""

from typing import TYPE_CHECKING

from torch import Tensor

from fewstep.networks.families.base import OfDiffusers, TwoTimeNetwork

if TYPE_CHECKING:
    from diffusers import AuraFlowTransformer2DModel


class AuraFlow(OfDiffusers):
    """An ``AuraFlowTransformer2DModel`` on latents (B, C, H, W). Conditions: ``encoder_hidden_states``
    (B, tokens, D); ``image`` (B, C', H, W) where it takes more channels than the state has.
    """

    code, first = "auraflow", "pos_embed.proj"
    names_sigmas = False
    model: "AuraFlowTransformer2DModel"

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
        return {"encoder_hidden_states": (tokens, self.model.config["joint_attention_dim"])}


class TwoTimeAuraFlow(TwoTimeNetwork, AuraFlow):
    """Of an ``AuraFlowTransformer2DModel``."""
