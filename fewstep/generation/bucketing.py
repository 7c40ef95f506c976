"""Which buckets of aspects a model takes, and images put into them before they are encoded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.data.aspects import Size, assign, bucket_sizes, sizes_of, step_for
from fewstep.data.captions import Captioned
from fewstep.flows.signature import Model, network_of, shape_at, sized
from fewstep.networks import OfDiffusers
from fewstep.pipelines.arguments import side_step


def multiple_of(model: Model) -> int:
    """Of how many pixels the sides of a model's images are multiples: those of its VAE, times its patches or, of a
    U-Net, all of its halvings (it pads what is none, which costs quality)."""
    network, factor = network_of(model), 1 if model.latents is None else model.latents.factor
    if not isinstance(network, OfDiffusers):
        return factor
    config: Any = network.model.config
    levels = config.get("block_out_channels")
    return factor * (2 ** (len(levels) - 1) if levels else side_step(config))


def buckets_for(model: Model, size: int, step: int | None = None) -> tuple[int, list[Size]]:
    """The step of the sides and the sizes of the buckets that a model takes.

    Raises:
        ValueError: a size or a step that is none for it, or a model of squares alone.
    """
    step = step_for(size, multiple_of(model), step)
    found, why = [], ""
    for one in bucket_sizes(size, step):
        try:
            sized(model, None, one)
            found.append(one)
        except ValueError as error:
            why = str(error)
    if why and all(height == width for height, width in found):
        raise ValueError(
            f"buckets: true, and the model takes images of one shape ({why}): leave buckets out, the middle square of "
            "each image is taken then"
        )
    return step, found


@dataclass(frozen=True)
class Part:
    """Images of one size: their ``rows`` in the data, their height and width, and the shape of their latents."""

    rows: Sequence[int]
    size: Size
    shape: tuple[int, ...]

    def some(self, first: int, count: int) -> "Part":
        """Some of them, in their order."""
        return replace(self, rows=self.rows[first : first + count])

    def described(self) -> dict[str, Any]:
        """What the facts of a folder say of it."""
        return {"size": list(self.size), "shape": list(self.shape), "count": len(self.rows)}


def in_buckets(model: Model, source: Captioned, facts: dict[str, Any]) -> tuple[list[Part], Tensor]:
    """The images of each bucket, by the ``size``, ``bucket_step``, ``small`` and ``on_error`` of ``facts``; and the
    cut of each image (N, 4): its height, its width, and the top and left of its crop.

    Raises:
        ValueError: a model of squares, an image that cannot be read, or none that can be used.
    """
    rows, (_, sizes) = source.rows, buckets_for(model, facts["size"], facts["bucket_step"])
    found = sizes_of(rows.read, rows.names, source.identity) if rows.sizes is None else rows.sizes
    usable = [rows.problems.get(row, own) for row, own in enumerate(found)]
    put = assign(usable, rows.names, sizes, facts["small"], facts["on_error"])
    cuts = torch.zeros(len(rows), 4, dtype=torch.int32)
    for row, cut in put.places.items():
        cuts[row] = torch.tensor([cut.height, cut.width, cut.top, cut.left])
    parts = [Part(some, size, shape_at(model, size)) for some, size in zip(put.rows, put.sizes, strict=True)]
    return parts, cuts
