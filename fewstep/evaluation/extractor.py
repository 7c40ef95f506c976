"""Networks whose features stand for an image; here the small classifier that fewstep trains for itself.

An extractor is an ``nn.Module`` that maps images (B, C, H, W) in [-1, 1] to features (B, F), with F in
``num_features``; where it also tells classes apart, ``classify`` gives logits (B, classes). A network of one's own
will do; ``fewstep.evaluation.inception`` has the one that FID is defined by.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from fewstep.common.disk import replace_file
from fewstep.common.randomness import generator, mix
from fewstep.common.user_folders import cache_folder
from fewstep.data.batch import Data, has_classes
from fewstep.data.buckets import of_one_shape

_BATCH = 256
_LEAST_UPDATES = 600  # small data sets are gone through until there were as many
# A change to the network or its training makes another extractor: raise this and no older cache is taken for it.
_VERSION = 1


class SmallClassifier(nn.Module):
    """A compact CNN for images (C, H, W) of 8 to 64 pixels; its features are the activations before the last layer.

    ``accuracy`` is the share of held-out rows that it classified right when it was trained, else None.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, num_features: int = 128, width: int = 16) -> None:
        super().__init__()
        if len(shape) != 3 or not 8 <= min(shape[1:]) <= max(shape[1:]) <= 64:
            raise ValueError(f"the small classifier is made for images (C, H, W) of 8 to 64 pixels, not {tuple(shape)}")
        self.shape, self.num_features = tuple(shape), num_features
        self.accuracy: float | None = None
        channels, height, wide = self.shape
        layers: list[nn.Module] = []
        for out in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)]
            channels = out
            if min(height, wide) > 4:
                layers.append(nn.MaxPool2d(2))
                height, wide = height // 2, wide // 2
            layers.append(nn.ReLU())
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        flat = channels * height * wide
        self.neck = nn.Sequential(nn.Linear(flat, num_features, bias=False), nn.BatchNorm1d(num_features), nn.ReLU())
        self.head = nn.Linear(num_features, classes)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.shape:
            raise ValueError(f"this classifier was made for images {self.shape}, not {tuple(x.shape[1:])}")
        return self.neck(self.trunk(x))

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self(x))


@torch.no_grad()
def extract(extractor: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """Features (N, F) in float32 on the CPU, of images (N, C, H, W) on any device, clamped to [-1, 1] as a saved
    image would be. Computed on the extractor's device, ``batch_size`` images at a time."""
    return _in_batches(extractor.eval(), extractor, images, batch_size)


@torch.no_grad()
def accuracy(classifier: Any, images: Tensor, labels: Tensor, batch_size: int = 256) -> float:
    """The share of images (N, C, H, W) that ``classifier.classify`` puts in the class of ``labels`` (N,): with the
    labels that were asked for, how often a class-conditional model makes what it was asked."""
    logits = _in_batches(classifier.eval(), classifier.classify, images, batch_size)
    return float((logits.argmax(dim=1) == labels.cpu()).double().mean())


def identity_of(extractor: nn.Module | None) -> str | None:
    """A network by its kind and a hash of its weights: values by two networks cannot be compared."""
    if extractor is None:
        return None
    digest = hashlib.sha256()
    for value in extractor.state_dict().values():
        digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return f"{type(extractor).__name__} {digest.hexdigest()[:8]}"


def trained_classifier(
    data: Data,
    cache_dir: str | Path | None = None,
    seed: int = 0,
    epochs: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> SmallClassifier:
    """A :class:`SmallClassifier` trained on ``data``, or the one that was trained on just these rows before.

    Trains on the CPU in float32, the same for a seed and a number of threads, on nine tenths of the rows (at most
    5000 are held out, for ``accuracy``). Small data sets are repeated until there were 600 updates of 256 rows. The
    result is cached as safetensors, with a JSON file beside it, under ``cache_dir``, else ``$FEWSTEP_CACHE``, else
    ``~/.cache/fewstep``; a hash of all rows, the network, the seed and the number of epochs is its name.

    Args:
        data: finite images with ``class_labels``.
        progress: called with updates done and updates in all, after each.

    Returns:
        the classifier on the CPU, in eval mode and frozen.

    Raises:
        ValueError: data without end, with under 20 rows or without ``class_labels``, images it is not made for, a
            damaged cache file.
    """
    data = of_one_shape(data)
    if data.size is None:
        raise ValueError("a classifier trains on a data set, not on a density without end")
    if data.size < 20:
        raise ValueError(f"{data.size} rows are too few to train a classifier and to hold some out: give 20 or more")
    digest, classes = _fingerprint(data, data.size)
    model = _new(data.shape, classes, seed)
    recipe = {"data": digest, "seed": seed, "epochs": epochs, "classes": classes, "version": _VERSION}
    key = hashlib.sha256(f"{recipe} {model}".encode()).hexdigest()[:16]
    folder = cache_folder() if cache_dir is None else Path(cache_dir).expanduser()
    weights = folder / f"classifier-{key}.safetensors"
    if weights.is_file():
        _load(model, weights)
    else:
        model.accuracy = _train(model, data, data.size, seed, epochs, progress)
        facts = {**recipe, "shape": list(model.shape), "rows": data.size, "accuracy": model.accuracy}
        replace_file(weights.with_suffix(".json"), json.dumps(facts, indent=2).encode() + b"\n")
        replace_file(weights, save(model.state_dict(), {"accuracy": repr(model.accuracy)}))
    return model.eval().requires_grad_(False)


def _new(shape: tuple[int, ...], classes: int, seed: int) -> SmallClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(seed))
        return SmallClassifier(shape, classes)


def _load(model: SmallClassifier, weights: Path) -> None:
    try:
        with safe_open(weights, "pt") as file:
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            model.accuracy = float(file.metadata()["accuracy"])
    except (SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(
            f"the cached classifier {weights} is damaged ({error}): delete it, and it is trained anew"
        ) from error


def _train(
    model: SmallClassifier,
    data: Data,
    size: int,
    seed: int,
    epochs: int,
    progress: Callable[[int, int], None] | None,
) -> float:
    """Train in place; returns the accuracy on held-out rows."""
    draw = generator(seed, 1)
    order = torch.randperm(size, generator=draw)
    held_out, rows = order.tensor_split([min(5000, size // 10)])
    batch = min(_BATCH, len(rows))
    per_epoch = len(rows) // batch
    epochs = max(epochs, -(-_LEAST_UPDATES // per_epoch))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * per_epoch, pct_start=0.25)
    model.train()
    for epoch in range(epochs):
        shuffled = rows[torch.randperm(len(rows), generator=draw)]
        for i, index in enumerate(shuffled[: per_epoch * batch].split(batch)):
            picked = data.rows(index, draw)
            # Channels last is a third faster on the CPU; the convolutions follow their input.
            logits = model.classify(picked.data.contiguous(memory_format=torch.channels_last))
            loss = functional.cross_entropy(logits, picked.cond["class_labels"], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if progress:
                progress(epoch * per_epoch + i + 1, epochs * per_epoch)
    right = 0.0
    for index in held_out.split(_BATCH):
        picked = data.rows(index, draw)
        right += accuracy(model, picked.data, picked.cond["class_labels"]) * len(index)
    return right / len(held_out)


def _fingerprint(data: Data, size: int) -> tuple[str, int]:
    """A hash of every row and label, and the number of classes."""
    digest = hashlib.sha256(repr(data.shape).encode())
    classes = 0
    same = generator(0)  # a data set that flips at random flips the same rows each time it is hashed
    for index in torch.arange(size).split(4096):
        batch = data.rows(index, same)
        if not has_classes(batch.cond):
            raise ValueError("a classifier needs data with class_labels: use labelled data, or another extractor")
        digest.update(batch.data.contiguous().numpy().data)
        digest.update(batch.cond["class_labels"].contiguous().numpy().data)
        classes = max(classes, int(batch.cond["class_labels"].max()) + 1)
    return digest.hexdigest(), classes


def _in_batches(module: nn.Module, function: Callable[[Tensor], Tensor], images: Tensor, batch_size: int) -> Tensor:
    place = next((p.device for p in module.parameters()), images.device)
    parts = [function(part.to(place, torch.float32).clamp(-1, 1)) for part in images.split(batch_size)]
    return torch.cat(parts).float().cpu()
