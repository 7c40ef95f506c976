"""A ``UNet2DModel`` as the network of a field, and of a flow map."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fewstep.networks.families.base import OfDiffusers, TwoTimeNetwork
from fewstep.networks.families.conditions import label_shape
from fewstep.networks.stock_time import takes_any_type

if TYPE_CHECKING:
    from diffusers import UNet2DModel


class UNet(OfDiffusers):
    """``net(x, timestep, class_labels=None)`` over a diffusers ``UNet2DModel``; images (B, C, H, W)."""

    code = "unet2d"
    model: "UNet2DModel"

    def forward(
        self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None, image: Tensor | None = None
    ) -> Tensor:
        self.need(class_labels=class_labels)
        return self.call(self.model, x, timestep, class_labels, image)

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        return label_shape(self.model)


class TwoTimeUNet(TwoTimeNetwork, UNet):
    """Of a ``UNet2DModel``. One that needs nothing but the second time itself stays of diffusers' own class, with
    ``class_embed_type="timestep"``, and that time goes in as its class label."""

    model: Any

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if self.is_stock:
            takes_any_type(model)

    def predict(self, x: Tensor, s: Tensor, t: Tensor, guidance: Tensor | None = None, **cond: Any) -> Tensor:
        if self.is_stock and guidance is None:
            return self.call(self.model, x, s, t, cond.get("image"))
        return super().predict(x, s, t, guidance, **cond)

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        return {} if self.is_stock else super().condition_shapes(tokens)
