"""Modules and hooks that have a model of diffusers take rows of two times in the place of times.

It is part of the ``two_times.py`` of an export, so it needs torch and diffusers alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn


class RowProjection(nn.Module):
    """The sines and cosines of rows of times, (B, k) -> (B, k, C); of times (B,), as they are without it."""

    def __init__(self, project: nn.Module) -> None:
        super().__init__()
        self.project = project

    def forward(self, rows: Tensor) -> Tensor:
        return self.project(rows.flatten()).unflatten(0, rows.shape)


class RowWaves(nn.Module):
    """The same for waves of random frequencies, which are weights of a model and keep their name.

    Args:
        base: a Fourier projection of diffusers.
    """

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.weight, self.log, self.flip_sin_to_cos = base.weight, base.log, base.flip_sin_to_cos
        self._kind: Any = type(base)

    def forward(self, rows: Tensor) -> Tensor:
        return self._kind.forward(self, rows.flatten()).unflatten(0, rows.shape)


def embedding_like(base: TimestepEmbedding) -> TimestepEmbedding:
    """Another embedding of the widths of ``base``, with biases where it has them."""
    first, last = base.linear_1, base.linear_2
    out_dim, is_biased = last.out_features, first.bias is not None
    return TimestepEmbedding(first.in_features, first.out_features, out_dim=out_dim, sample_proj_bias=is_biased)


def at_random(made: Callable[[], nn.Module], like: Tensor) -> dict[str, Tensor]:
    """The weights that what is new in a model starts from where it has nothing of the kind itself: those of a module as
    it is ``made``, by a seed of their own, where ``like`` is and in its type."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        module = made()
    return {name: value.to(like.dtype) for name, value in module.to(like.device).state_dict().items()}


class RowEmbedding(TimestepEmbedding):
    """The embedding of projected rows (B, k, C): (B, D), or (B, 2 D), that of s and that of t, where it is ``late``.
    Of projected times (B, C), as it is in the model.

    Args:
        base: that of the model, the names of whose weights it keeps.
        late: whether both times are embedded alike, apart; else the second has an embedding of its own.
        guided: how many numbers on guidance stand last in a row: its strength, or that and the ends of its interval.
        is_stacked: (B, 1, D) or (B, 2, D) in the place of (B, D) or (B, 2 D).
    """

    def __init__(self, base: TimestepEmbedding, late: bool, guided: int, is_stacked: bool = False) -> None:
        super().__init__(base.linear_1.in_features, base.linear_2.out_features)
        self.linear_1, self.act, self.linear_2, self.post_act = base.linear_1, base.act, base.linear_2, base.post_act
        self.late, self.guided, self.is_stacked = late, guided, is_stacked
        self.second = None if late else embedding_like(base)
        self.strength = embedding_like(base) if guided else None
        self.interval = nn.ModuleList(embedding_like(base) for _ in range(guided - 1))

    @property
    def new(self) -> list[Any]:
        """What the model did not have before."""
        return [*([] if self.second is None else [self.second]), *self.of_guidance]

    @property
    def of_guidance(self) -> list[Any]:
        """What embeds the numbers on guidance, in their order."""
        return [] if self.strength is None else [self.strength, *self.interval]

    @property
    def like(self) -> dict[str, Tensor]:
        """The weights that what is new starts from."""
        return self.state_dict()

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        if sample.ndim == 2:
            return super().forward(sample, condition)
        # In memory of their own, as matrix products may round otherwise where rows lie apart.
        times = [time.contiguous() for time in sample.unbind(1)]
        times, told = times[: len(times) - self.guided], times[len(times) - self.guided :]
        if self.second is None:
            embedded = [super(RowEmbedding, self).forward(time) for time in times]
        else:
            embedded = [super().forward(times[0]) + self.second(times[1])]
        for embed, number in zip(self.of_guidance, told, strict=True):
            more = embed(number)
            embedded = [embedding + more for embedding in embedded]
        return torch.stack(embedded, dim=1) if self.is_stacked else torch.cat(embedded, dim=-1)


class LabelAndTimes(nn.Module):
    """The class embedding of a U-Net for rows (B, k) of a label, the second time and what there is on guidance: the sum
    of the embeddings that there are, to be added to that of the first time. ``late``: (B, 2 D), without and with it.

    Args:
        label: the model's own class embedding, if it has one. project, embed: how it embeds its time.
    """

    def __init__(self, label: nn.Module | None, project: nn.Module, embed: Any, late: bool, guided: int) -> None:
        super().__init__()
        self.label, self.project, self.guided = label, project, guided
        self._embed = [embed]  # in a list, so that its weights are not among the weights of this module too
        channels, dim = embed.linear_1.in_features, embed.linear_1.out_features
        self.second = None if late else TimestepEmbedding(channels, dim)
        self.strength = TimestepEmbedding(channels, dim) if guided else None
        self.interval = nn.ModuleList(TimestepEmbedding(channels, dim) for _ in range(guided - 1))

    @property
    def new(self) -> list[Any]:
        """What the model did not have before."""
        return [*([] if self.second is None else [self.second]), *self.of_guidance]

    @property
    def of_guidance(self) -> list[Any]:
        """What embeds the numbers on guidance, in their order."""
        return [] if self.strength is None else [self.strength, *self.interval]

    @property
    def like(self) -> dict[str, Tensor]:
        """The weights that what is new starts from."""
        return self._embed[0].state_dict()

    def forward(self, rows: Tensor) -> Tensor:
        embed = self._embed[0] if self.second is None else self.second
        dtype = embed.linear_1.weight.dtype
        first = rows.shape[1] - 1 - self.guided
        labels, time, told = rows[:, :first].contiguous(), rows[:, first], rows[:, first + 1 :].unbind(1)
        projected = self.project(time).to(dtype)
        if isinstance(self.label, nn.Embedding):
            label = self.label(labels[:, 0].to(torch.long))
        else:
            label = 0 if self.label is None else self.label(labels.to(dtype))
        for more, number in zip(self.of_guidance, told, strict=True):
            label = label + more(self.project(number).to(dtype))
        if self.second is not None:
            return label + self.second(projected)
        second = embed.forward(projected)  # past the hook that makes room for it
        return torch.cat([label + torch.zeros_like(second), label + second], dim=-1)


class EachHalf(nn.Module):
    """SiLU and a linear layer for each half of the input, (B, 2 D) -> (B, 2 E), or along ``dim`` 1 of (B, 2, D). Both
    are as they would be alone, to the last bit."""

    def __init__(self, layer: nn.Linear, dim: int = -1) -> None:
        super().__init__()
        self.weight, self.bias, self.dim = layer.weight, layer.bias, dim

    def forward(self, both: Tensor) -> Tensor:
        halves = (nn.functional.silu(half.contiguous()) for half in both.chunk(2, dim=self.dim))
        return torch.cat([nn.functional.linear(half, self.weight, self.bias) for half in halves], dim=self.dim)


# The hooks below are functions of what is passed to a module or comes out of it, and know nothing else: gradient
# checkpointing, which calls modules again, gets the same from them.


def hear(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], width: int, dim: int, late: bool) -> Any:
    """Of two embeddings in one argument, the first or, ``late``, the second: they lie side by side in (B, 2 width), or
    above each other in (B, 2, ...) where there are more dimensions."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim != dim:
            return value
        return value[:, width * late : width * (late + 1)].contiguous() if value.shape[1] == 2 * width else value

    return tuple(map(one, args)), {name: one(value) for name, value in kwargs.items()}


def twice(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    """What is added to both embeddings alike."""
    return torch.cat([output, output], dim=-1)


def with_room(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    """Beside the embedding of s (B, D), room for that of t."""
    return torch.cat([output, torch.zeros_like(output)], dim=-1)


def second_of_two(_: nn.Module, __: Any, output: tuple[Any, ...], width: int) -> tuple[Any, ...]:
    """What the head of a PixArt hears: the embedding of t; for the blocks there are both."""
    return output[0], output[1][:, width:]


def last_token(_: nn.Module, __: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the head of a Wan hears: the embedding of t; for the blocks there are both."""
    return output[0][:, -1:], *output[1:]


def one_time(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], late: bool, guided: int) -> Any:
    """Of rows of two times, the one that is heard, and what stands behind them."""
    columns = [int(late), *range(2, 2 + guided)]

    def one(value: Any) -> Any:
        is_rows = isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 2
        return value[:, columns] if is_rows and value.shape[1] == 1 + len(columns) else value

    return tuple(map(one, args)), {name: one(value) for name, value in kwargs.items()}
