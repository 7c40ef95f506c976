"""A ``ZImageTransformer2DModel``: how it is called, and it with a second time."""

from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from ..channels import beside
from .rows import embedding_like
from .transformer import TwoTimeTransformer


def call(
    model: Any,
    x: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    image: Tensor | None = None,
) -> Tensor:
    """A ``ZImageTransformer2DModel`` on the state x (B, C, H, W). Its own time runs from noise at 0 to data at 1, and
    it predicts what leads there. It takes a list of prompts, each as long as it is."""
    text, mask = encoder_hidden_states, encoder_attention_mask
    assert text is not None
    prompts = list(text) if mask is None else [row[keep.bool()] for row, keep in zip(text, mask, strict=True)]
    output = model(list(beside(model, x, image)[:, :, None]), 1 - timestep / 1000, prompts).sample
    return -torch.stack(output)[:, :, 0]


class TwoTimeZImageTransformer2DModel(TwoTimeTransformer, ZImageTransformer2DModel):
    """A ``ZImageTransformer2DModel``."""

    call = staticmethod(call)

    def take_rows(self, late: bool, guided: int) -> None:
        self.t_embedder = RowTimes(self.t_embedder, late, guided)
        if late:
            heads = list(self.all_final_layer.values())
            self.tell_late([*self.noise_refiner, *self.layers], *heads, width=self.t_embedder.mlp[2].out_features)


class RowTimes(nn.Module):
    """The time embedding of a Z-Image, of rows of times (B, k): (B, D), or (B, 2 D) where it is ``late``."""

    def __init__(self, base: Any, late: bool, guided: int) -> None:
        super().__init__()
        self.mlp, self._project = base.mlp, base.timestep_embedding
        self.late, self.guided = late, guided
        mould = TimestepEmbedding(base.mlp[0].in_features, base.mlp[0].out_features, out_dim=base.mlp[2].out_features)
        self.second = None if late else mould
        self.of_guidance = nn.ModuleList(embedding_like(mould) for _ in range(guided))

    @property
    def new(self) -> list[Any]:
        """What the model did not have before."""
        return [*([] if self.second is None else [self.second]), *self.of_guidance]

    @property
    def like(self) -> dict[str, Tensor]:
        """The weights that what is new starts from."""
        renamed = {"0.": "linear_1.", "2.": "linear_2."}
        return {renamed[key[:2]] + key[2:]: value for key, value in self.mlp.state_dict().items()}

    def forward(self, rows: Tensor) -> Tensor:
        first = self.mlp[0]
        project = lambda time: self._project(time, first.in_features).to(first.weight.dtype)  # noqa: E731
        if rows.ndim == 1:
            return self.mlp(project(rows))
        times = list(rows.T)
        told = times[len(times) - self.guided :]
        if self.second is None:
            embedded = [self.mlp(project(time)) for time in times[:2]]
        else:
            embedded = [self.mlp(project(times[0])) + self.second(project(times[1]))]
        for embed, number in zip(self.of_guidance, told, strict=True):
            embedded = [embedding + embed(project(number)) for embedding in embedded]
        return torch.cat(embedded, dim=-1)
