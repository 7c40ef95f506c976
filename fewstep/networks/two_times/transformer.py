"""What the transformers with a second time have in common."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .base import TwoTimes
from .rows import RowEmbedding, RowProjection, hear


class TwoTimeTransformer(TwoTimes):
    """A transformer: its ``timestep`` is rows of s, t and, where it is told it, 100 times the strength of guidance
    (a tenth of it where times run to 1)."""

    call: Any  # how the pipelines of its family call it
    may_be_told = False  # whether some models of the family take a guidance of their own, by ``guidance_embeds``

    def predict(self, x: Tensor, s: Tensor, t: Tensor, guidance: Tensor | None = None, **cond: Any) -> Tensor:
        if self.own_guidance:  # by its own name, as before; no part of the rows
            return self.call(self, x, torch.stack([s, self.rows(s, t, None)[:, 0]], dim=-1), guidance=guidance, **cond)
        rows = torch.cat([s[:, None], self.rows(s, t, guidance)], dim=-1)
        return self.call(self, x, rows, **cond)

    @property
    def own_guidance(self) -> bool:
        """Whether the model was distilled to be told the strength of guidance, and goes on being told it so."""
        model: Any = self
        return self.may_be_told and model.config["guidance_embeds"]

    def embed_rows(self, embeddings: Any, late: bool, guided: int) -> None:
        """Have the modules ``time_proj`` and ``timestep_embedder`` of a combined embedding take rows.

        Raises:
            ValueError: guidance for a model that has its own.
        """
        if guided and self.own_guidance:
            name = type(self).__name__.removeprefix("TwoTime")
            raise ValueError(f"this {name} is told the strength of guidance as it is: leave guidance out")
        embeddings.time_proj = RowProjection(embeddings.time_proj)
        embeddings.timestep_embedder = RowEmbedding(embeddings.timestep_embedder, late, guided)

    def tell_late(self, blocks: list[Any], *heads: Any, width: int, dim: int = 2) -> None:
        """Of two embeddings of ``width`` in one the last blocks and the heads hear the second, the others the first."""
        for block, is_last in [*self.by_turn(blocks), *((head, True) for head in heads)]:
            tell(block, is_last, width, dim)


def tell(block: Any, late: bool, width: int, dim: int = 2) -> None:
    """Have a block hear the second, or the first, of two embeddings of ``width`` in one."""
    block.register_forward_pre_hook(functools.partial(hear, width=width, dim=dim, late=late), with_kwargs=True)


def checkpoint_each(blocks: list[Any]) -> None:
    """Have each block compute again, in the backward pass, what it had in the forward one: where diffusers' own way
    passes on too much or too little."""
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
