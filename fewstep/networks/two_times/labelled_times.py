"""What the U-Nets with a second time have in common."""

import functools
from typing import Any

import torch
from torch import Tensor

from .base import TwoTimes
from .rows import LabelAndTimes, hear, with_room


class LabelledTimes(TwoTimes):
    """A U-Net: its ``class_labels`` are rows of the label, where it has classes, of t, and of 100 times the strength of
    guidance, where it is told it, and of 1000 times the ends of its interval."""

    call: Any

    def take_rows(self, late: bool, guided: int) -> None:
        _widen_labels(self, late, guided)

    def predict(
        self,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        guidance: Tensor | None = None,
        *,
        class_labels: Tensor | None = None,
        **cond: Any,
    ) -> Tensor:
        return self.call(self, x, s, class_labels=_labelled(class_labels, self.rows(s, t, guidance)), **cond)


def _labelled(class_labels: Tensor | None, rows: Tensor) -> Tensor:
    """Rows with the label, a number or a vector, before them."""
    if class_labels is None:
        return rows
    labels = class_labels.to(rows)
    return torch.cat([labels if labels.ndim == 2 else labels[:, None], rows], dim=-1)


def _widen_labels(model: Any, late: bool, guided: int) -> None:
    """Have a U-Net's class embedding take rows.

    Raises:
        ValueError: its labels are embedded as times are.
    """
    if model.config["class_embed_type"] not in (None, "projection", "simple_projection", "identity"):
        kind = f"class_embed_type={model.config['class_embed_type']!r}"
        raise ValueError(f"a {type(model).__mro__[3].__name__} with {kind} has no room for a second time")
    if model.config.get("class_embeddings_concat"):
        raise ValueError("a UNet2DConditionModel with class_embeddings_concat has no room for a second time")
    label = model.class_embedding
    model.class_embedding = LabelAndTimes(label, model.time_proj, model.time_embedding, late, guided)
    if not late:
        return
    width = model.time_embedding.linear_2.out_features
    model.time_embedding.register_forward_hook(with_room)
    blocks = [(block, k > len(model.down_blocks)) for k, block in enumerate(_blocks(model)) if block is not None]
    if model.late_share is not None:
        blocks = model.by_turn([block for block, _ in blocks])
    for block, is_last in blocks:
        block.register_forward_pre_hook(functools.partial(hear, width=width, dim=2, late=is_last), with_kwargs=True)


def _blocks(model: Any) -> list[Any]:
    """Those of a U-Net, down and up; None for a middle that it has not."""
    return [*model.down_blocks, model.mid_block, *model.up_blocks]
