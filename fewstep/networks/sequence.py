"""A network for rows of tokens: the student and teacher of short texts and other sequences."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

from fewstep.networks.second_time import SecondTime, sinusoidal

_WIDEST = 1 << 16
_NEAR = 7  # places that the first layer sees: attention takes thousands of steps to find its neighbours by itself


class SequenceTransformer(nn.Module):
    """A transformer over rows (B, length, tokens) with one time, ``net(x, t)``, or two, ``net(x, s, t)``; its output is
    the logits of tokens, (B, length, tokens).

    Rows are one-hot vectors with noise, so the first layer is linear: a convolution over the nearest places. In the
    blocks every place sees every other. The times scale and shift each block's input (adaptive normalisation,
    arXiv 2212.09748).

    Args:
        length, tokens: of a row.
        width, depth, heads: of the transformer.
        times: 1 for a field, 2 for a flow map.
        classes: the number of classes for a ``class_labels`` condition (B,), 0 for none.
        guidance: takes the strength of guidance as a condition ``guidance`` (B,), as an MLP does.

    Raises:
        ValueError: a number out of its range, or a width that the heads do not share.
    """

    def __init__(
        self,
        length: int,
        tokens: int,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        times: int = 1,
        classes: int = 0,
        guidance: bool | Literal["interval"] = False,
    ) -> None:
        super().__init__()
        for name, number, least, most in (
            ("length", length, 1, _WIDEST), ("tokens", tokens, 2, 1 << 20), ("width", width, 2, _WIDEST),
            ("depth", depth, 1, 1000), ("heads", heads, 1, width), ("classes", classes, 0, 1 << 20),
        ):  # fmt: skip
            if not least <= number <= most:
                raise ValueError(f"a SequenceTransformer with {name} {number}: {least} to {most:,} can be made")
        if width % heads:
            raise ValueError(f"a SequenceTransformer of width {width} with {heads} heads: the heads share the width")
        if guidance == "interval":
            raise ValueError("a SequenceTransformer takes the strength of guidance alone: guidance: true")
        self.config = {
            "length": length, "tokens": tokens, "width": width, "depth": depth, "heads": heads, "times": times,
            "classes": classes, "guidance": guidance,
        }  # fmt: skip
        self.input = nn.Conv1d(tokens, width, _NEAR, padding=_NEAR // 2)
        self.places = nn.Parameter(torch.randn(length, width) / width**0.5)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.second_time = SecondTime(width) if times == 2 else None
        self.label = nn.Embedding(classes, width) if classes else None
        self.strength = SecondTime(width, scale=3.0) if guidance else None
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = _Adaptive(width)
        self.output = nn.Linear(width, tokens)

    @property
    def shape(self) -> tuple[int, int]:
        """(L, V), of one sample."""
        return self.config["length"], self.config["tokens"]

    @property
    def classes(self) -> int:
        """How many classes it is conditioned on."""
        return self.config["classes"]

    @property
    def takes_guidance(self) -> bool:
        """Whether it is told the strength of guidance."""
        return bool(self.config["guidance"])

    def forward(
        self, x: Tensor, *times: Tensor, class_labels: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        if len(times) != self.config["times"]:
            raise ValueError(f"a SequenceTransformer with times={self.config['times']} was called with {len(times)}")
        if x.shape[1:] != self.shape:
            raise ValueError(f"a SequenceTransformer for rows {self.shape} was given {tuple(x.shape[1:])}")
        told = self.time(sinusoidal(times[0], 64, low=0.5, high=100.0).to(self.input.weight.dtype))
        if self.second_time is not None:
            told = told + self.second_time(times[1])
        if self.label is not None:
            if class_labels is None:
                raise ValueError("this SequenceTransformer was made with classes: class_labels (B,) are needed")
            told = told + self.label(class_labels)
        if guidance is not None and self.strength is None:
            raise ValueError("this SequenceTransformer takes no strength of guidance: make it with guidance=True")
        if self.strength is not None:
            told = told + self.strength(torch.ones_like(times[0]) if guidance is None else guidance.to(times[0]))
        h = self.input(x.transpose(1, 2)).transpose(1, 2) + self.places
        told = silu(told)
        for block in self.blocks:
            h = block(h, told)
        return self.output(self.norm(h, told))

    def with_second_time(self, guidance: bool | str = False) -> "SequenceTransformer":
        """The same network with a second time that is silent, as a student starts."""
        made = {**self.config, "times": 2, "guidance": guidance or self.config["guidance"]}
        student = SequenceTransformer(**made).to(self.input.weight)
        student.load_state_dict(self.state_dict(), strict=False)
        return student


class _Adaptive(nn.Module):
    """Layer normalisation, scaled and shifted by what the network is told (B, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.told = nn.Linear(width, 2 * width)
        nn.init.zeros_(self.told.weight)
        nn.init.zeros_(self.told.bias)

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        scale, shift = self.told(told)[:, None].chunk(2, dim=-1)
        return self.norm(h) * (1 + scale) + shift


class _Block(nn.Module):
    """Attention, then two layers, each added to what it is given."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(_Adaptive(width) for _ in range(2))
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.first, self.last = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        rows, places, width = h.shape
        q, k, v = (
            part.reshape(rows, places, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norms[0](h, told)).chunk(3, dim=-1)
        )
        seen = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, places, width)
        h = h + self.mix(seen)
        return h + self.last(gelu(self.first(self.norms[1](h, told))))
