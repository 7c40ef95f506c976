"""Small random twins of the networks that people distill: a velocity field of each, its conditions, and how it gets its
second time. A training step takes 50 to 200 ms on one CPU core."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.batch import Batch
from fewstep.networks import MLP, SecondTime, UNet

Call = Callable[[nn.Module, Tensor, Tensor, dict[str, Tensor]], Tensor]


class Times(nn.Module):
    """``net(x, s, **cond)`` around any model; with a second time, ``net(x, s, t, **cond)``.

    The second time is added to what the model's time embeddings give, by a hook on each.

    Args:
        call: how the model is called: (model, x, time, conditions).
        embeddings: the names of the model's time embeddings, with outputs (B, dim).
    """

    def __init__(self, model: nn.Module, call: Call, embeddings: list[str], dim: int) -> None:
        super().__init__()
        self.model, self.call, self.embeddings, self.dim = model, call, embeddings, dim
        self.second_time: SecondTime | None = None

    def with_second_time(self) -> "Times":
        student = deepcopy(self)
        student.second_time = SecondTime(self.dim).to(next(self.parameters()))
        return student

    def forward(self, x: Tensor, s: Tensor, t: Tensor | None = None, **cond: Tensor) -> Tensor:
        if t is None or self.second_time is None:
            return self.call(self.model, x, s, cond)
        second = self.second_time(t)
        places = [self.model.get_submodule(name) for name in self.embeddings]
        hooks = [place.register_forward_hook(lambda _module, _given, out: out + second) for place in places]
        try:
            return self.call(self.model, x, s, cond)
        finally:
            for hook in hooks:
                hook.remove()


@dataclass(frozen=True)
class Family:
    """A network that gives the velocity, and the rows it takes: of this shape, so many, with conditions."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rows: int
    cond: Callable[[int], dict[str, Tensor]] = lambda rows: {}

    def batch(self) -> Batch:
        torch.manual_seed(1)
        return Batch(torch.randn(self.rows, *self.shape), self.cond(self.rows))

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make()


def _unet() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet(
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

    def call(model: nn.Module, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return model(x, 1000 * t, encoder_hidden_states=cond["text"]).sample

    return Times(model, call, ["time_embedding"], 128)


def _dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    layers = 4
    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=4, num_layers=layers, sample_size=16,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip

    def call(model: nn.Module, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return model(x, 1000 * t, cond["class_labels"]).sample

    return Times(model, call, [f"transformer_blocks.{i}.norm1.emb" for i in range(layers)], 128)


def _sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=128, pooled_projection_dim=64,
        pos_embed_max_size=16,
    )  # fmt: skip

    def call(model: nn.Module, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return model(x, cond["text"], cond["pooled"], 1000 * t).sample

    return Times(model, call, ["time_text_embed"], 128)


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    # Where each of the 8 x 8 packed patches is; text has no place.
    place = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(8.0), torch.arange(8.0), indexing="ij"), -1)
    model.register_buffer("place", place.reshape(64, 3))

    def call(model: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        text = cond["text"]
        return model(
            x, text, cond["pooled"], timestep=t, img_ids=model.place, txt_ids=model.place.new_zeros(text.shape[1], 3)
        ).sample

    return Times(model, call, ["time_text_embed"], 128)


def _labels(rows: int) -> dict[str, Tensor]:
    return {"class_labels": torch.arange(rows) % 10}


def _text(rows: int) -> dict[str, Tensor]:
    return {"text": torch.randn(rows, 16, 64)}


def _texts(rows: int) -> dict[str, Tensor]:
    return {**_text(rows), "pooled": torch.randn(rows, 64)}


FAMILIES = {
    "MLP": Family(lambda: MLP(2, width=512, depth=6), (2,), 512),
    "UNet2DModel": Family(_unet, (3, 16, 16), 64),
    "UNet2DConditionModel": Family(_conditional_unet, (4, 16, 16), 64, _text),
    "DiTTransformer2DModel": Family(_dit, (4, 16, 16), 64, _labels),
    "SD3Transformer2DModel": Family(_sd3, (4, 16, 16), 64, _texts),
    "FluxTransformer2DModel": Family(_flux, (64, 16), 64, _texts),
}
