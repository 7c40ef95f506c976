"""A network for signals: trajectories, plans, sound, anything of a few channels along one axis."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from fewstep.networks.second_time import SecondTime, sinusoidal

_WIDEST = 1 << 16
_DILATIONS = (1, 2, 4, 8)
_WAVES = (1, 2, 4)  # half periods of a number from -1 to 1


class Conv1dNet(nn.Module):
    """Convolutions along signals (B, channels, length) with one time, ``net(x, t)``, or two, ``net(x, s, t)``.

    Residual blocks of two convolutions over three places, ``dilation`` 1, 2, 4, 8, 1, ... places apart, as in WaveNet
    and DiffWave (arXiv 1609.03499, 2009.09761) but seeing both ways: after eight blocks a place has seen 40 to both
    sides. What the network is told (times, classes, numbers) scales and shifts each block (arXiv 1709.07871), and
    weighs waves along the signal which are added to it, so that a number may mean its beginning or its end.

    Args:
        channels, length: of a signal.
        width, depth: of the network, and its blocks.
        times: 1 for a field, 2 for a flow map.
        classes: the number of classes for a ``class_labels`` condition (B,), 0 for none.
        guidance: takes the strength of guidance as a condition ``guidance`` (B,), as an MLP does.
        vector: numbers in a condition ``vector`` (B, vector), 0 for none; NaN stands for one that is not known, as for
            an MLP.

    Raises:
        ValueError: a number out of its range; when called with other times or shapes, or without the labels of its
            classes.
    """

    def __init__(
        self,
        channels: int,
        length: int,
        width: int = 64,
        depth: int = 8,
        times: int = 1,
        classes: int = 0,
        guidance: bool | Literal["interval"] = False,
        vector: int = 0,
    ) -> None:
        super().__init__()
        for name, number, least, most in (
            ("channels", channels, 1, _WIDEST), ("length", length, 1, 1 << 24), ("width", width, 8, _WIDEST),
            ("depth", depth, 1, 1000), ("classes", classes, 0, 1 << 20), ("vector", vector, 0, 1 << 20),
        ):  # fmt: skip
            if not least <= number <= most:
                raise ValueError(f"a Conv1dNet with {name} {number}: {least} to {most:,} can be made")
        if width % 8:
            raise ValueError(f"a Conv1dNet of width {width}: it is a multiple of 8, such as {8 * round(width / 8)}")
        if guidance == "interval":
            raise ValueError("a Conv1dNet takes the strength of guidance alone: guidance: true")
        self.config = {
            "channels": channels, "length": length, "width": width, "depth": depth, "times": times,
            "classes": classes, "guidance": guidance, "vector": vector,
        }  # fmt: skip
        told = 2 * width
        self.input = nn.Conv1d(channels, width, 3, padding=1)
        place, waves = (torch.arange(length) + 0.5) / length, torch.arange(width) % length
        self.places = nn.Parameter(torch.cos(math.pi * waves[:, None] * place))
        self.placed = nn.Linear(told, width)
        self.time = nn.Sequential(nn.Linear(64, told), nn.SiLU(), nn.Linear(told, told))
        self.second_time = SecondTime(told) if times == 2 else None
        self.label = nn.Embedding(classes, told) if classes else None
        self.strength = SecondTime(told, scale=3.0) if guidance else None
        self.vector = (
            nn.Sequential(nn.Linear(vector * (2 + 2 * len(_WAVES)), told), nn.SiLU(), nn.Linear(told, told))
            if vector
            else None
        )
        self.blocks = nn.ModuleList(_Block(width, told, _DILATIONS[i % len(_DILATIONS)]) for i in range(depth))
        self.output = nn.Conv1d(width, channels, 3, padding=1)

    @property
    def shape(self) -> tuple[int, int]:
        """(C, L), of one sample."""
        return self.config["channels"], self.config["length"]

    @property
    def classes(self) -> int:
        """The classes that it is conditioned on, 0 for none."""
        return self.config["classes"]

    @property
    def takes_guidance(self) -> bool:
        """Whether it is told the strength of guidance."""
        return bool(self.config["guidance"])

    def forward(
        self,
        x: Tensor,
        *times: Tensor,
        class_labels: Tensor | None = None,
        guidance: Tensor | None = None,
        vector: Tensor | None = None,
    ) -> Tensor:
        if len(times) != self.config["times"]:
            raise ValueError(f"a Conv1dNet with times={self.config['times']} was called with {len(times)}")
        if x.shape[1:] != self.shape:
            raise ValueError(f"a Conv1dNet for signals {self.shape} was given {tuple(x.shape[1:])}")
        told = self.time(sinusoidal(times[0], 64, low=0.5, high=30.0).to(x.dtype))
        if self.second_time is not None:
            told = told + self.second_time(times[1])
        if self.label is not None:
            if class_labels is None:
                raise ValueError("this Conv1dNet was made with classes: class_labels (B,) are needed")
            told = told + self.label(class_labels)
        if guidance is not None and self.strength is None:
            raise ValueError("this Conv1dNet takes no strength of guidance: make it with guidance=True")
        if self.strength is not None:
            told = told + self.strength(torch.ones_like(times[0]) if guidance is None else guidance.to(times[0]))
        if (count := self.config["vector"]) or vector is not None:
            numbers = x.new_full((len(x), count), torch.nan) if vector is None else vector.to(x)
            if self.vector is None or numbers.shape != (len(x), count):
                raise ValueError(
                    f"vector of shape {tuple(numbers.shape)} for a Conv1dNet made with vector={count}: (B, {count}) is "
                    "needed"
                )
            told = told + self.vector(_features(numbers))
        told = silu(told)
        h = self.input(x) + self.placed(told)[:, :, None] * self.places
        for block in self.blocks:
            h = block(h, told)
        return self.output(h)

    def with_second_time(self, guidance: bool | str = False) -> "Conv1dNet":
        """The same network with a second time that is silent, as a student starts."""
        made = {**self.config, "times": 2, "guidance": guidance or self.config["guidance"]}
        student = Conv1dNet(**made).to(self.output.weight)
        student.load_state_dict(self.state_dict(), strict=False)
        return student


def _features(numbers: Tensor) -> Tensor:
    """Numbers (B, n), which of them are not known, and their waves, which tell near ones apart (arXiv 2006.10739)."""
    known, is_unknown = numbers.nan_to_num(), numbers.isnan().to(numbers)
    waves = [wave(k * math.pi * known) * (1 - is_unknown) for k in _WAVES for wave in (torch.sin, torch.cos)]
    return torch.cat([known, is_unknown, *waves], dim=1)


class _Block(nn.Module):
    """Two convolutions, the second of what is scaled and shifted by what the network is told, added to h."""

    def __init__(self, width: int, told: int, dilation: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(2))
        self.first = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.last = nn.Conv1d(width, width, 3, padding=1)
        self.told = nn.Linear(told, 2 * width)

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        scale, shift = self.told(told)[:, :, None].chunk(2, dim=1)
        inner = self.first(silu(self.norms[0](h)))
        return h + self.last(silu(self.norms[1](inner) * (1 + scale) + shift))
