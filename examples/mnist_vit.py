"""Speed up your own model: a pretrained MNIST transformer, from 50 network calls to 1 or 2.

The teacher is a class-conditional flow by Sofia Dominguez (github.com/sofia-dominguezc/MNIST-diffusion, MIT): a small
vision transformer of 208,705 parameters that predicts the data x1 on the linear path. Nothing in it knows of fewstep.
What a network of your own needs is shown in :class:`TwoTimeViT`: one line where it embeds its time. As this one was
trained with images in [0, 1] and fewstep has them in [-1, 1], :class:`UnitRange` and :class:`HalfLinear` say so.

    fewstep distill recipes/mnist-vit-itvm.yaml          # with MNIST
    fewstep distill recipes/mnist-vit-datafree.yaml      # with no data at all

Both want the weights at ``$FEWSTEP_DATA/mnist-x1-flow-vit.pth`` (or the path given as ``--teacher.options.weights``).
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.flows.fields import NetworkField, VelocityField
from fewstep.flows.guided import Guided
from fewstep.flows.paths import Linear
from fewstep.flows.paths import Path as Trajectory
from fewstep.networks import SecondTime


class ViT(nn.Module):
    """The teacher's network, ``net(x, t, class_labels)``: 16 patches of 7 x 7, 2 tokens of time and 2 of class.

    Module names are those of the published weights. ``class_labels`` (B,): 0 to 9, or 10 for no class.
    """

    def __init__(self, width: int = 64, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 16, width))
        self.patch_embed = nn.Conv2d(1, width, 7, stride=7)
        self.transformer = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True)
            for _ in range(layers)
        )
        self.unpatch = nn.ConvTranspose2d(width, 1, 7, stride=7)
        self.y_encoder = nn.Embedding(11, 2 * width)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        return self.decode(x, self.embed_time(t), class_labels)

    def embed_time(self, t: Tensor) -> Tensor:
        """(B,) -> (B, 128)."""
        frequencies = torch.exp(torch.arange(64, device=t.device) * (-math.log(10000) / 63))
        angles = t[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def decode(self, x: Tensor, time: Tensor, class_labels: Tensor) -> Tensor:
        """The transformer, given its time embedding."""
        patches = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed
        extra = torch.cat([time, self.y_encoder(class_labels)], dim=-1).unflatten(-1, (4, -1))
        h = torch.cat([patches, extra.to(patches.dtype)], dim=1)
        for layer in self.transformer:
            h = layer(h)
        return self.unpatch(h[:, :16].transpose(1, 2).unflatten(-1, (4, 4)))


class TwoTimeViT(ViT):
    """The student, ``net(x, s, t, class_labels)``: the teacher and a second time that starts silent."""

    def __init__(self) -> None:
        super().__init__()
        self.second_time = SecondTime(128)

    def forward(self, x: Tensor, s: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        return self.decode(x, self.embed_time(s) + self.second_time(t), class_labels)


class UnitRange(nn.Module):
    """A network for images x1 in [0, 1] as one for y = 2 x1 - 1 in [-1, 1].

    Its states ``t x1 + (1 - t) x0`` are ``(t / 2) y + (1 - t) x0``, the states of :class:`HalfLinear`, plus ``t / 2``.
    """

    def __init__(self, vit: ViT) -> None:
        super().__init__()
        self.vit = vit
        self.classes, self.shape = 10, (1, 28, 28)

    def forward(self, x: Tensor, *times: Tensor, class_labels: Tensor) -> Tensor:
        return 2 * self.vit(x + times[0].view(-1, 1, 1, 1) / 2, *times, class_labels) - 1


@dataclass(frozen=True)
class HalfLinear(Linear):
    """``x_t = (t / 2) x1 + (1 - t) x0``: the linear path of data half as large."""

    def alpha(self, t: Tensor) -> Tensor:
        return t / 2

    def alpha_dot(self, t: Tensor) -> Tensor:
        return torch.full_like(t, 0.5)

    def time_of(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return 2 * alpha / (2 * alpha + sigma)

    def same_as(self, other: Trajectory) -> bool:
        return self == other


def student() -> UnitRange:
    """The student's network, before it has the teacher's weights."""
    return UnitRange(TwoTimeViT())


def teacher(weights: str | None = None, guidance: float = 1.5) -> VelocityField:
    """The pretrained flow; with ``guidance`` other than 1, classifier-free guided by its own no-class row.

    Raises:
        FileNotFoundError: if the weights are not there.
    """
    path = Path(weights or Path(os.environ.get("FEWSTEP_DATA", ".")) / "mnist-x1-flow-vit.pth")
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights at {path}: get mnist-x1-flow-vit.pth from github.com/sofia-dominguezc/MNIST-diffusion and set "
            "FEWSTEP_DATA to its folder, or pass --teacher.options.weights"
        )
    network = ViT()
    network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    field = NetworkField(UnitRange(network), HalfLinear(), prediction="data").on(Linear())
    return field if guidance == 1 else Guided(field, guidance, null={"class_labels": 10})
