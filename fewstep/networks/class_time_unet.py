"""Diffusers' ``UNet2DModel`` with a second time beside its classes, and with the strength of guidance beside both.

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


class GuidedTimeUNet2DModel(UNet2DModel):
    """A ``UNet2DModel`` whose ``class_labels`` are rows of (label, second timestep, strength of guidance), (B, 3). The
    label is not looked at where the model has no classes."""

    @functools.wraps(UNet2DModel.__init__)
    def __init__(self, *args: Any, **config: Any) -> None:
        super().__init__(*args, **config)
        first = self.time_embedding.linear_1
        second, strength = (TimestepEmbedding(first.in_features, first.out_features) for _ in range(2))
        self.class_embedding = LabelAndTime(self.class_embedding, self.time_proj, second, strength)


class LabelAndTime(nn.Module):
    """The class embedding for rows of (label, second timestep) or (label, second timestep, strength of guidance): the
    sum of the embeddings that there are."""

    def __init__(
        self, label: nn.Module | None, project: nn.Module, second: nn.Module, strength: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.label, self.project, self.second, self.strength = label, project, second, strength

    def forward(self, rows: Tensor) -> Tensor:
        dtype = next(self.second.parameters()).dtype
        embedding = self.second(self.project(rows[:, 1]).to(dtype))
        if self.label is not None:
            embedding = self.label(rows[:, 0].to(torch.long)) + embedding
        if self.strength is not None:
            # Strengths are a few units; the frequencies of the projection are made for hundreds.
            embedding = embedding + self.strength(self.project(100 * rows[:, 2]).to(dtype))
        return embedding
