"""A network for points: the student and teacher of 2-D densities and of any data of a few dozen numbers."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.common.errors import unknown
from fewstep.networks.second_time import SecondTime, sinusoidal

_WIDEST = 1 << 20
ACTIVATIONS = {"gelu": nn.functional.gelu, "relu": nn.functional.relu, "silu": nn.functional.silu}


class MLP(nn.Module):
    """``depth`` hidden layers of ``width``, with one time, ``net(x, t)``, or two, ``net(x, s, t)``.

    Args:
        dim: numbers in a sample; samples are (B, dim).
        times: 1 for a field, 2 for a flow map.
        classes: the number of classes for a ``class_labels`` condition (B,), 0 for none.
        guidance: takes the strength of guidance as a condition ``guidance`` (B,); 1, which is none, if it is not given.
            ``interval``: with the times between which it acts, (B, 3); all times, if they are not given.
        vector: numbers in a condition ``vector`` (B, vector), 0 for none. NaN stands for a number that is not known, so
            for none of them where it is not given: what guidance drops it for.
        activation: gelu, relu or silu, after each hidden layer. relu bends sharply: maps to data with hard edges, as
            the checkerboard's, jump, and it learns them better; a derivative of the network in time has steps then.

    Raises:
        ValueError: no layer, or more and wider ones than fit anywhere; an unknown activation; when called with another
            number of times, or without the labels of its classes.
    """

    def __init__(
        self,
        dim: int,
        width: int = 256,
        depth: int = 4,
        times: int = 1,
        classes: int = 0,
        guidance: bool | Literal["interval"] = False,
        vector: int = 0,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        for name, number, least, most in (
            ("dim", dim, 1, _WIDEST), ("width", width, 1, _WIDEST), ("depth", depth, 1, 1000),
            ("classes", classes, 0, _WIDEST), ("vector", vector, 0, _WIDEST),
        ):  # fmt: skip
            if not least <= number <= most:
                raise ValueError(f"an MLP with {name} {number}: {least} to {most:,} can be made")
        if activation not in ACTIVATIONS:
            raise unknown("activation of an MLP", activation, ACTIVATIONS)
        self.config: dict[str, Any] = {
            "dim": dim, "width": width, "depth": depth, "times": times, "classes": classes, "guidance": guidance,
        } | ({"vector": vector} if vector else {})  # fmt: skip
        self.config |= {"activation": activation} if activation != "gelu" else {}
        self.activation = ACTIVATIONS[activation]
        self.input = nn.Linear(dim, width)
        self.time = nn.Linear(64, width)
        self.second_time = SecondTime(width) if times == 2 else None
        self.label = nn.Embedding(classes, width) if classes else None
        self.strength = SecondTime(width, scale=3.0) if guidance else None  # silent at first, as a second time is
        self.interval = nn.ModuleList(SecondTime(width) for _ in range(2 if guidance == "interval" else 0))
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.output = nn.Linear(width, dim)
        self.vector = nn.Linear(2 * vector, width) if vector else None  # the numbers, and which are not known

    def forward(
        self,
        x: Tensor,
        *times: Tensor,
        class_labels: Tensor | None = None,
        guidance: Tensor | None = None,
        vector: Tensor | None = None,
    ) -> Tensor:
        if len(times) != self.config["times"]:
            raise ValueError(f"an MLP with times={self.config['times']} was called with {len(times)}: make it to fit")
        h = self.input(x) + self.time(sinusoidal(times[0], 64, low=0.5, high=30.0).to(x.dtype))
        if self.second_time is not None:
            h = h + self.second_time(times[1])
        if self.label is not None:
            if class_labels is None:
                raise ValueError("this MLP was made with classes: class_labels (B,) are needed")
            h = h + self.label(class_labels)
        if guidance is not None and self.strength is None:
            raise ValueError("this MLP takes no strength of guidance: make it with guidance=True")
        if self.strength is not None:
            strength = torch.ones_like(times[0]) if guidance is None else guidance.to(times[0])
            strength, *ends = strength.unbind(1) if strength.ndim == 2 else (strength,)
            if len(ends) not in (0, len(self.interval)):
                raise ValueError('this MLP takes the strength of guidance alone: make it with guidance="interval"')
            h = h + self.strength(strength)
            if len(self.interval):
                ends = ends or (torch.zeros_like(strength), torch.ones_like(strength))
                h = h + self.interval[0](ends[0]) + self.interval[1](ends[1])
        if (count := self.config.get("vector", 0)) or vector is not None:
            told = x.new_full((len(x), count), torch.nan) if vector is None else vector.to(x)
            if self.vector is None or told.shape != (len(x), count):
                raise ValueError(
                    f"vector of shape {tuple(told.shape)} for an MLP made with vector={count}: (B, {count}) is needed"
                )
            h = h + self.vector(torch.cat([told.nan_to_num(), told.isnan().to(x)], dim=1))
        for layer in self.hidden:
            h = layer(self.activation(h))
        return self.output(self.activation(h))

    @property
    def takes_guidance(self) -> bool:
        """Whether it is told the strength of guidance."""
        return bool(self.config["guidance"])

    @property
    def takes_interval(self) -> bool:
        """Whether it is told the times between which guidance acts, too."""
        return self.config["guidance"] == "interval"

    def with_second_time(self, guidance: bool | str = False) -> "MLP":
        """The same network with a second time that is silent, as a student starts."""
        student = MLP(**{**self.config, "times": 2, "guidance": guidance or self.config["guidance"]})
        student = student.to(self.input.weight)
        student.load_state_dict(self.state_dict(), strict=False)
        return student
