"""How noise is paired with data: independently, as objectives do themselves, or by minibatch optimal transport.

Pairs that a model has made (reflow) come from ``fewstep.generation.reflow`` and are read by ``fewstep.data.pairs``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.common.errors import unknown
from fewstep.common.randomness import normal
from fewstep.data.batch import Batch, Data
from fewstep.data.buckets import of_one_shape
from fewstep.data.given import Around


def couple(noise: Tensor, data: Tensor) -> Tensor:
    """The rows of ``noise`` (n, ...) permuted, so that row i belongs to row i of ``data``, (n, ...) each.

    The permutation minimises ``sum_i |noise_i - data_i|^2``, exactly, in float64 (arXiv 2302.00482, 2304.14772). Its
    time grows with n^3: see ``docs/guides/couplings.md``.

    Raises:
        ValueError: shapes that differ, numbers that are not finite.

    >>> noise = couple(torch.randn_like(images), images)
    """
    from scipy.optimize import linear_sum_assignment

    if noise.shape != data.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}, data {tuple(data.shape)}: they must agree")
    # |x0 - x1|^2 but for the squares, whose sum is that of every permutation.
    cost = -(data.flatten(1).double() @ noise.flatten(1).double().T)
    if not cost.isfinite().all():
        raise ValueError("noise or data are not finite (NaN or infinite): they cannot be paired by their distance")
    _, columns = linear_sum_assignment(cost.cpu().numpy())
    return noise[torch.from_numpy(columns).to(noise.device)]


def couple_within_labels(noise: Tensor, data: Tensor, labels: Tensor) -> Tensor:
    """The same within the rows of each label (n,): so noise stays independent of the label, as sampling draws it."""
    paired = torch.empty_like(noise)
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        paired[rows] = couple(noise[rows], data[rows])
    return paired


def _may_couple(data: Data) -> bool:
    """Whether the rows come with rows of another data set that are drawn beside them, not made from them."""
    return bool(getattr(data, "may_couple", False))


COUPLINGS: dict[str, Callable[..., Tensor]] = {"ot": couple, "ot-within-labels": couple_within_labels}


def uncoupled(data: Data, whole: bool = False) -> Data:
    """The data alone, for what shows and judges: it asks for thousands of rows at once, for no noise, and for every
    condition. Of data in buckets, the rows of one shape (``of_one_shape``), or as a ``whole`` all."""
    while isinstance(data, Around):
        data = data.data
    return data if whole else of_one_shape(data)


class Coupled(Around):
    """Data whose rows bring their noise along, paired with them: a ``Data`` around another.

    The noise of the rows that are asked for together is drawn from their generator, after what the data draws from
    it, and permuted. Rows and conditions keep their order, so a condition stays with its row, and no row is left
    out. In training, rows are asked for a chunk at a time (those that share a generator: ``training.chunk``, 64 unless
    said otherwise), so the assignment is within a chunk: results do not depend on how many processes share a batch,
    and a larger chunk couples better and costs more.

    With conditions ``ot`` is biased: noise becomes dependent on the condition, and sampling draws it independently.
    ``ot-within-labels`` pairs the rows of each class label alone: noise given a label stays normal, and much less is
    straightened. The score from a velocity (``VelocityField.score``) does not hold either way.

    Around :class:`~fewstep.data.between.Between` the rows of its source are paired with the data, in the noise's place.

    Args:
        data: what is coupled. coupling: ``ot``, see :func:`couple`, or ``ot-within-labels``.
        group: rows assigned together at most; more, asked for at once, are assigned in groups of this size.

    Raises:
        ValueError: an unknown coupling, data that comes with noise of its own.

    >>> fit(student, FlowMatching(), Coupled(data), steps=20_000, batch=256, chunk=256)
    """

    def __init__(self, data: Data, coupling: str = "ot", group: int = 1024) -> None:
        if coupling not in COUPLINGS:
            raise unknown("coupling", coupling, COUPLINGS)
        if group < 1:
            raise ValueError(f"group is {group}: at least one row is assigned")
        super().__init__(data)
        self.coupling, self.group = coupling, group
        if isinstance(data, Coupled) or (getattr(data, "brings_noise", False) and not _may_couple(data)):
            raise self._paired()

    def rows(self, index: Tensor, generator: torch.Generator) -> Batch:
        """The rows of ``index`` (n,) as the data gives them, with their noise."""
        batch = self.data.rows(index, generator)
        if batch.noise is not None and not _may_couple(self.data):
            raise self._paired()
        noise, assign = normal(batch.data, generator) if batch.noise is None else batch.noise, COUPLINGS[self.coupling]
        parts = [noise, batch.data]
        if self.coupling == "ot-within-labels":
            if "class_labels" not in batch.cond:
                raise ValueError("coupling: ot-within-labels needs data with class labels: say ot, or independent")
            parts.append(batch.cond["class_labels"])
        groups = zip(*(part.split(self.group) for part in parts), strict=True)
        return Batch(batch.data, batch.cond, torch.cat([assign(*group) for group in groups]))

    def _paired(self) -> ValueError:
        kind = type(self.data).__name__
        return ValueError(
            f"coupling {self.coupling!r} pairs data with noise, and the data ({kind}) comes with its own: "
            "say coupling: independent"
        )
