"""A class-conditional diffusers ``UNet2DModel`` with a second time.

An export carries this file beside its weights, so it needs torch and diffusers alone.
"""

import functools
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn


class ClassTimeUNet2DModel(UNet2DModel):
    """A ``UNet2DModel`` whose ``class_labels`` are rows of (label, second timestep), shape (B, 2)."""

    # The parent's signature is kept, as diffusers reads from it what belongs into the config.
    @functools.wraps(UNet2DModel.__init__)
    def __init__(self, *args: Any, **config: Any) -> None:
        super().__init__(*args, **config)
        first = self.time_embedding.linear_1
        second = TimestepEmbedding(first.in_features, first.out_features)
        self.class_embedding = LabelAndTime(self.class_embedding, self.time_proj, second)


class LabelAndTime(nn.Module):
    """The class embedding for rows of (label, second timestep): the sum of both embeddings."""

    def __init__(self, label: nn.Module, project: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.label, self.project, self.second = label, project, second

    def forward(self, label_and_time: Tensor) -> Tensor:
        label, time = label_and_time.unbind(-1)
        embedding = self.label(label.to(torch.long))
        return embedding + self.second(self.project(time).to(embedding.dtype))
