"""A ``UNet1DModel``: how it is called, and it with a second time."""

from typing import Any

from diffusers import UNet1DModel
from diffusers.models.embeddings import GaussianFourierProjection, TimestepEmbedding
from torch import Tensor, nn

from ..channels import beside, signal_step
from .rows import RowEmbedding, RowProjection, RowWaves, at_random
from .transformer import TwoTimeTransformer, checkpoint_each


def call(model: Any, x: Tensor, timestep: Tensor, image: Tensor | None = None) -> Tensor:
    """A ``UNet1DModel`` on the state x (B, C, L), behind which other channels may stand.

    Raises:
        ValueError: a length that its levels cannot halve.
    """
    step = signal_step(model.config)
    if x.shape[-1] % step:
        raise ValueError(
            f"signals of {x.shape[-1]} numbers: this UNet1DModel halves them {step.bit_length() - 1} times, so their "
            f"length must be a multiple of {step}"
        )
    return model(beside(model, x, image), timestep).sample


class TwoTimeUNet1DModel(TwoTimeTransformer, UNet1DModel):
    """A ``UNet1DModel``, which takes rows of times as transformers do."""

    call = staticmethod(call)

    def take_rows(self, late: bool, guided: int) -> None:
        if late:
            raise ValueError("second_time: late, and a U-Net of signals hears its time in its first block alone: say t")
        if not any("NoSkip" in kind or "Resnet" in kind for kind in self.config["down_block_types"]):
            raise ValueError("none of the blocks of this UNet1DModel hears its time: no student can be told a second")
        project: Any = self.time_proj
        if isinstance(project, GaussianFourierProjection):
            self.noisiest = 1.0
        if self.config["use_timestep_embedding"]:
            waves = RowWaves if isinstance(project, GaussianFourierProjection) else RowProjection
            self.time_proj: Any = waves(project)
            self.time_mlp = RowEmbedding(self.time_mlp, late, guided)
        elif isinstance(project, GaussianFourierProjection):
            self.time_proj = HeardWaves(project, guided)
        else:
            raise ValueError(
                "a UNet1DModel with positional times and without use_timestep_embedding has no room for two"
            )

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Any = None) -> None:
        checkpoint_blocks(self)


def checkpoint_blocks(model: Any) -> None:
    """Gradient checkpointing of a model with one time or two: diffusers has none for it."""
    checkpoint_each([*model.down_blocks, model.mid_block, *model.up_blocks])


class HeardWaves(RowWaves):
    """What the first block hears beside the signal: the waves of the first time in a row, and added to them what is
    made of the others': (B, C)."""

    def __init__(self, base: Any, guided: int) -> None:
        super().__init__(base)
        self.told = 2 * len(base.weight)
        self.second, *others = (
            TimestepEmbedding(self.told, 8 * self.told, out_dim=self.told) for _ in range(1 + guided)
        )
        self.of_guidance = nn.ModuleList(others)

    @property
    def new(self) -> list[Any]:
        """What the model did not have before."""
        return [self.second, *self.of_guidance]

    @property
    def like(self) -> dict[str, Tensor]:
        """The weights that what is new starts from: its own, at random, as the model embeds no time by itself."""
        return at_random(lambda: TimestepEmbedding(self.told, 8 * self.told, out_dim=self.told), self.weight)

    def forward(self, rows: Tensor) -> Tensor:
        waves = super().forward(rows)
        if rows.ndim == 1:
            return waves
        heard, *others = waves.unbind(1)
        for embed, other in zip(self.new, others, strict=True):
            heard = heard + embed(other.to(embed.linear_1.weight.dtype))
        return heard
