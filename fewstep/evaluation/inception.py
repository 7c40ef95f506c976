"""The Inception network of FID (arXiv 1706.08500, weights of 2015-12-05), from a file of weights at hand.

The network is written out here so that FID needs no torchvision. Its layers carry the names of the published
conversions (pytorch-fid, torch-fidelity), whose files load as they are. It differs from textbook Inception v3 as the
TensorFlow original does: average pools that do not count padding, a max pool in the last block, a resize whose pixels
have their corners at whole numbers.
"""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

_SOURCE = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"

Kernel = int | tuple[int, int]
Layer = tuple[int, Kernel] | tuple[int, Kernel, int]  # channels, kernel, stride


def inception(weights_path: str | Path) -> "Inception":
    """The extractor of FID: images (B, 1 or 3, H, W) in [-1, 1] to features (B, 2048), in eval mode and frozen.

    Args:
        weights_path: the published ``.pth`` file (read without running any code in it), or a ``.safetensors`` copy.

    Raises:
        FileNotFoundError: no such file; says where the published one is.
        ValueError: a file that holds no weights, or those of another network.
    """
    path = Path(weights_path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no Inception weights at {path}: download {_SOURCE} and give its path")
    model = Inception()
    try:
        safe = path.suffix == ".safetensors"
        weights = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        # Left out of older files, and used by training alone. The classifier on top is not used here.
        missing = [
            name for name in model.load_state_dict(weights, strict=False).missing_keys if "num_batches" not in name
        ]
    except (RuntimeError, pickle.UnpicklingError, SafetensorError, EOFError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} cannot be read as Inception weights ({reason}): the file is {_SOURCE}") from error
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} weights of FID's Inception, such as {missing[0]}: get {_SOURCE}")
    return model.eval().requires_grad_(False)


class Inception(nn.Module):
    """Inception v3 up to its last pool. Images become 8-bit first, as FID is defined on saved images."""

    num_features = 2048

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _block_a(192, 32), _block_a(256, 64), _block_a(288, 64)
        self.Mixed_6a = _Mixed(
            288, {"branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)]}, pool="reduce"
        )
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(_block_c, (128, 160, 160, 192))
        self.Mixed_7a = _Mixed(
            768,
            {
                "branch3x3": [(192, 1), (320, 3, 2)],
                "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)],
            },
            pool="reduce",
        )
        self.Mixed_7b, self.Mixed_7c = _block_e(1280, "average"), _block_e(2048, "max")

    def forward(self, x: Tensor) -> Tensor:
        pixels = ((x + 1) * 127.5).round().clamp(0, 255)
        x = (_resize(pixels.expand(-1, 3, -1, -1), 299) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(functional.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(functional.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3))


class _Conv(nn.Module):
    def __init__(
        self, width: int, out: int, kernel: Kernel, stride: int = 1, padding: int | tuple[int, int] = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)), inplace=True)


class _Mixed(nn.Module):
    """Chains of convolutions side by side, and a pool. A chain may end in two convolutions of the same input.

    Layer i of a chain is the attribute ``{chain}_{i}`` (``{chain}`` alone in a chain of one), as in the files.
    """

    def __init__(
        self, width: int, chains: Mapping[str, Sequence[Layer | list[Layer]]], pool: str, pool_width: int = 0
    ) -> None:
        super().__init__()
        self.pool = pool
        self.chains: list[list[list[str]]] = []
        for chain, layers in chains.items():
            inputs, names = width, []
            for i, layer in enumerate(layers, start=1):
                stem = chain if len(layers) == 1 else f"{chain}_{i}"
                fork = layer if isinstance(layer, list) else [layer]
                names.append([stem] if len(fork) == 1 else [f"{stem}{letter}" for letter in "ab"])
                for name, (out, kernel, *stride) in zip(names[-1], fork, strict=True):
                    high, wide = kernel if isinstance(kernel, tuple) else (kernel, kernel)
                    padding = (0, 0) if stride else (high // 2, wide // 2)  # the size shrinks by strides alone
                    self.add_module(name, _Conv(inputs, out, kernel, *stride, padding=padding))
                inputs = fork[0][0]
            self.chains.append(names)
        if pool_width:
            self.branch_pool = _Conv(width, pool_width, 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for chain in self.chains:
            y = x
            for names in chain:
                y = torch.cat([self.get_submodule(name)(y) for name in names], dim=1)
            outputs.append(y)
        if self.pool == "reduce":
            outputs.append(functional.max_pool2d(x, 3, stride=2))
        elif self.pool == "max":
            outputs.append(self.branch_pool(functional.max_pool2d(x, 3, stride=1, padding=1)))
        else:
            outputs.append(self.branch_pool(functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)))
        return torch.cat(outputs, dim=1)


def _block_a(width: int, pool_width: int) -> _Mixed:
    chains = {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}
    return _Mixed(width, chains, "average", pool_width)


def _block_c(c: int) -> _Mixed:
    across, down = (1, 7), (7, 1)
    chains = {
        "branch1x1": [(192, 1)],
        "branch7x7": [(c, 1), (c, across), (192, down)],
        "branch7x7dbl": [(c, 1), (c, down), (c, across), (c, down), (192, across)],
    }
    return _Mixed(768, chains, "average", 192)


def _block_e(width: int, pool: str) -> _Mixed:
    fork: list[Layer] = [(384, (1, 3)), (384, (3, 1))]
    chains = {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), fork], "branch3x3dbl": [(448, 1), (384, 3), fork]}
    return _Mixed(width, chains, pool, 192)


def _resize(x: Tensor, size: int) -> Tensor:
    """Bilinear, as TensorFlow 1 did it: output pixel i is read at i * (input size) / (output size)."""
    for dim in (3, 2):
        places = torch.arange(size, dtype=x.dtype, device=x.device) * (x.shape[dim] / size)
        low = places.long()
        high = (low + 1).clamp(max=x.shape[dim] - 1)
        part = (places - low).view(-1, *[1] * (3 - dim))
        below = x.index_select(dim, low)
        x = below + (x.index_select(dim, high) - below) * part
    return x
