"""Class labels without labels: clusters of a model's own features, by which a model can then be guided.

What a flow or diffusion model computes in the middle of its network, on data with a little noise, tells classes apart
that nobody told it (arXiv 2312.08825, which clusters while it trains; offline, as here: 2210.06462).
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fewstep.common.errors import unknown
from fewstep.common.randomness import generator
from fewstep.data.batch import Data
from fewstep.data.couplings import uncoupled
from fewstep.flows.fields import NetworkField, VelocityField
from fewstep.flows.guided import unguided
from fewstep.flows.signature import classes_of, device_of, needed_conditions
from fewstep.generation.images import write
from fewstep.objectives.teacher_critic import Enough, blocks_of, recording, tokens_of

_BATCH = 256


@dataclass(frozen=True, eq=False)
class Clusters:
    """The clusters of some data.

    Attributes:
        labels: the cluster of each row, (N,), numbered from the largest on.
        sizes: how many rows each has, (K,).
        layer: the module of the network whose features these are.
        agreement: the normalised mutual information with the class labels that the data have; None where they have
            none.
    """

    labels: Tensor
    sizes: Tensor
    layer: str
    agreement: float | None


def cluster(
    model: VelocityField,
    data: Data,
    clusters: int,
    *,
    at: float = 0.85,
    layer: str | None = None,
    attempts: int = 8,
    seed: int = 0,
) -> Clusters:
    """K-means of a model's features of the data: the mean over pixels or tokens of what a module of its network gives
    at time ``at``, each feature standardised and each row of length 1.

    Args:
        model: a field with a network, without conditions.
        data: with an end.
        clusters: how many.
        at: the time in (0, 1) whose noise is on the data.
        layer: a module of the network by name; else the block in the middle, in the order in which they run.
        attempts: k-means from so many starts (k-means++), of which the best is kept.
        seed: decides the noise and the starts.

    Raises:
        ValueError: a model without a network or with conditions, data without end or with fewer rows than clusters, a
            time outside (0, 1), a layer that is not there, a cluster without rows.
    """
    field = unguided(model)
    if not isinstance(field, NetworkField):
        raise ValueError(f"clusters are of a network's features, and a {type(model).__name__} has no network")
    if needed := {*needed_conditions(field), *(["class_labels"] if classes_of(field) else [])}:
        raise ValueError(
            f"clusters stand in for labels, and this model needs {', '.join(sorted(needed))} already: take one without "
            "conditions"
        )
    if not 0 < at < 1:
        raise ValueError(f"at is {at:g}: the time whose noise is on the data lies in (0, 1)")
    data = uncoupled(data)
    if data.size is None:
        raise ValueError("a density without end has no rows to label: draw some into a file first")
    if not 2 <= clusters <= data.size:
        raise ValueError(f"{clusters} clusters of {data.size} rows: 2 at least, and no more than there are rows")
    layer, rows, given = _features(field, data, at, layer, seed)
    labels = kmeans(rows, clusters, attempts, seed)
    order = labels.bincount(minlength=clusters).argsort(descending=True, stable=True)
    labels = order.argsort()[labels]
    agreement = None if given is None else mutual_information(labels, given)
    return Clusters(labels, labels.bincount(minlength=clusters), layer, agreement)


@torch.no_grad()
def _features(
    field: NetworkField, data: Data, at: float, layer: str | None, seed: int
) -> tuple[str, Tensor, Tensor | None]:
    """The module that was asked, its features of all rows (N, F), and the labels of the data where they have some."""
    network, device, draw = field.network.eval(), device_of(field), generator(seed, 1)
    blocks = blocks_of(network)
    if layer is not None and layer not in dict(network.named_modules()):
        raise unknown("layer of the network", layer, blocks)
    found: list[Tensor] = []
    given: list[Tensor] = []
    for index in torch.arange(data.size or 0).split(_BATCH):
        batch = data.rows(index, draw)
        t = torch.full((len(batch),), at)
        x, _ = field.path.sample(torch.randn(batch.data.shape, generator=draw), batch.data, t)
        if layer is None:  # once, on the first rows
            with recording(network, blocks) as seen:
                field(x[:1].to(device), t[:1].to(device))
            layer = list(seen)[(len(seen) - 1) // 2]
        with recording(network, [layer], stop=True) as seen, suppress(Enough):
            field(x.to(device), t.to(device))
        if layer not in seen:
            raise ValueError(f"layer {layer!r} of the network gives no features: name another, such as {blocks[0]}")
        found.append(tokens_of(seen[layer]).mean(1).float().cpu())
        if "class_labels" in batch.cond:
            given.append(batch.cond["class_labels"])
    assert layer is not None
    rows = torch.cat(found)
    rows = (rows - rows.mean(0)) / rows.std(0).clamp(min=1e-6)
    return layer, normalize(rows, dim=1), torch.cat(given) if given else None


def kmeans(rows: Tensor, clusters: int, attempts: int = 8, seed: int = 0) -> Tensor:
    """The cluster of each of the rows (N, F), (N,): the best of some attempts.

    Raises:
        ValueError: a cluster stays empty in all of them, as rows are too much alike.
    """
    from scipy.cluster.vq import ClusterError, kmeans2

    points, best = rows.double().numpy(), None
    for attempt in range(attempts):
        with suppress(ClusterError), np.errstate(invalid="ignore"):  # of rows that are all alike
            # seed is rng in newer stubs, and works in both
            found = kmeans2(points, clusters, iter=30, minit="++", missing="raise", seed=seed + attempt)  # pyright: ignore[reportCallIssue]
            centres, labels = torch.from_numpy(found[0]), torch.from_numpy(found[1]).long()
            distance = float((rows - centres.to(rows)[labels]).square().sum())
            if len(labels.unique()) == clusters and (best is None or distance < best[0]):
                best = (distance, labels)
    if best is None:
        raise ValueError(
            f"{clusters} clusters of {len(rows)} rows: one stays empty, from {attempts} starts: ask for fewer, or "
            " name another layer"
        )
    return best[1]


def mutual_information(a: Tensor, b: Tensor) -> float:
    """The normalised mutual information of two labellings (N,) in [0, 1]: ``2 I(a; b) / (H(a) + H(b))``; 1 where each
    tells the other, and where both are one class."""
    a, b = (each.unique(return_inverse=True)[1] for each in (a, b))
    joint = torch.zeros(int(a.max()) + 1, int(b.max()) + 1, dtype=torch.float64)
    joint.index_put_((a, b), torch.ones(len(a), dtype=torch.float64), accumulate=True)
    joint /= len(a)

    def entropy(p: Tensor) -> Tensor:
        return -torch.special.xlogy(p, p).sum()

    ha, hb, both = entropy(joint.sum(1)), entropy(joint.sum(0)), entropy(joint)
    return float(2 * (ha + hb - both) / (ha + hb)) if ha + hb > 0 else 1.0


def write_labelled(data: Data, labels: Tensor, out: str | Path) -> None:
    """The rows of data with these labels (N,) as a ``.npz`` file that ``fewstep.load_data`` reads; images of 8 bits
    stay such. Conditions beside the labels are left out. The file is whole or absent."""
    rows = uncoupled(data).rows(torch.arange(len(labels)), generator(0)).data
    pixels = (rows + 1) * 127.5
    if rows.ndim == 4 and float(rows.abs().max()) <= 1 and torch.allclose(pixels, pixels.round(), atol=1e-3):
        rows = pixels.round().byte()
    write(rows, {"class_labels": labels}, Path(out))
