"""Small random twins of the networks that people distill: a velocity field of each, and its conditions. A training step
takes 50 to 200 ms on one CPU core."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep import networks
from fewstep.data.batch import Batch
from fewstep.flows.fields import NetworkField
from fewstep.flows.paths import Linear, Reversed


@dataclass(frozen=True)
class Family:
    """A network, and the rows it takes: of this shape, so many, with conditions."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rows: int
    cond: Callable[[int], dict[str, Tensor]] = lambda rows: {}

    def batch(self) -> Batch:
        torch.manual_seed(1)
        return Batch(torch.randn(self.rows, *self.shape), self.cond(self.rows))

    def field(self) -> NetworkField:
        torch.manual_seed(0)
        network = self.make()
        if isinstance(network, networks.MLP):
            return NetworkField(network)
        return NetworkField(network, Reversed(1000.0), "flow", path=Linear())


def _unet() -> nn.Module:
    from diffusers import UNet2DModel

    return networks.UNet(
        UNet2DModel(
            sample_size=16, in_channels=3, out_channels=3, block_out_channels=(32, 64), layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=32, norm_num_groups=8,
        )
    )  # fmt: skip


def _conditional_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    return networks.ConditionalUNet(model)


def _dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=4, num_layers=4, sample_size=16,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    return networks.DiT(model)


def _sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=128, pooled_projection_dim=64,
        pos_embed_max_size=16,
    )  # fmt: skip
    return networks.SD3(model)


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    return networks.Flux(model)


def _labels(rows: int) -> dict[str, Tensor]:
    return {"class_labels": torch.arange(rows) % 10}


def _text(rows: int) -> dict[str, Tensor]:
    return {"encoder_hidden_states": torch.randn(rows, 16, 64)}


def _texts(rows: int) -> dict[str, Tensor]:
    return {**_text(rows), "pooled_projections": torch.randn(rows, 64)}


FAMILIES = {
    "MLP": Family(lambda: networks.MLP(2, width=512, depth=6), (2,), 512),
    "UNet2DModel": Family(_unet, (3, 16, 16), 64),
    "UNet2DConditionModel": Family(_conditional_unet, (4, 16, 16), 64, _text),
    "DiTTransformer2DModel": Family(_dit, (4, 16, 16), 64, _labels),
    "SD3Transformer2DModel": Family(_sd3, (4, 16, 16), 64, _texts),
    "FluxTransformer2DModel": Family(_flux, (4, 16, 16), 64, _texts),
}
