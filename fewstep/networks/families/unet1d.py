"""A ``UNet1DModel`` as the network of a field, and of a flow map."""

from typing import TYPE_CHECKING

from torch import Tensor

from fewstep.networks.families.base import OfSignals, TwoTimeNetwork

if TYPE_CHECKING:
    from diffusers import UNet1DModel


class UNet1D(OfSignals):
    """``net(x, timestep)`` over a diffusers ``UNet1DModel``: signals (B, C, L), as the waveforms of Dance Diffusion.
    Condition: ``image`` (B, C', L), where it takes more channels than the state has."""

    code = "unet1d"
    model: "UNet1DModel"

    def forward(self, x: Tensor, timestep: Tensor, image: Tensor | None = None) -> Tensor:
        return self.call(self.model, x, timestep, image)

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        return {}


class TwoTimeUNet1D(TwoTimeNetwork, UNet1D):
    """Of a ``UNet1DModel``."""
