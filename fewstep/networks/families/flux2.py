"""A ``Flux2Transformer2DModel`` as the network of a field, and of a flow map."""

from typing import TYPE_CHECKING

from torch import Tensor

from fewstep.networks.families.base import OfDiffusers, TwoTimeNetwork

if TYPE_CHECKING:
    from diffusers import Flux2Transformer2DModel


class Flux2(OfDiffusers):
    """A ``Flux2Transformer2DModel`` (dev, klein) on latents (B, C, H, W), each place of which is a token: its VAE makes
    32 channels, whose 2 x 2 patches are the state's 128.

    Conditions: ``encoder_hidden_states`` (B, tokens, D), ``guidance`` (B,) where the model was distilled to take it,
    and ``image`` (B, C', H, W) where it takes more channels than the state has.

    Args:
        size: height and width of the latents, which the model's config does not say; for ``shape`` alone.
    """

    code, first = "flux2", "x_embedder"
    model: "Flux2Transformer2DModel"

    def __init__(self, model: "Flux2Transformer2DModel", size: int = 64) -> None:
        super().__init__(model)
        self.size = size

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

    @property
    def takes_guidance(self) -> bool:
        return self.model.config["guidance_embeds"]

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        guidance = {"guidance": ()} if self.model.config["guidance_embeds"] else {}
        return {"encoder_hidden_states": (tokens, self.model.config["joint_attention_dim"]), **guidance}

    @property
    def shape(self) -> tuple[int, ...]:
        """That of one sample, (C, H, W)."""
        return self.channels, self.size, self.size


class TwoTimeFlux2(TwoTimeNetwork, Flux2):
    """Of a ``Flux2Transformer2DModel``."""
