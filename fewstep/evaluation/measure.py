"""Measures samples that come batch by batch: points are kept whole, of images no more than their features."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.common.errors import unknown
from fewstep.data.batch import Batch
from fewstep.evaluation.extractor import accuracy, extract
from fewstep.evaluation.features import FeatureStatistics, frechet_distance, kid, precision_recall
from fewstep.evaluation.inception import Inception
from fewstep.evaluation.points import energy_distance, histogram_kl, quantiles, sliced_wasserstein

# Of the distances to the end points, row by row: their root mean square, their median, and what 99 % are below.
ENDS = ("rmse", "error_median", "error_99")
METRICS = (*ENDS, "sliced_w2", "energy", "histogram_kl", "fd", "fid", "kid", "precision", "recall", "accuracy")
_CLOUD = 16_000  # rows of a cloud that are sorted along every direction
_PAIRS = 5_000  # rows of which all pairs are compared
_SHOWN = 64


def possible_metrics(
    shape: Sequence[int], has_teacher: bool, extractor: nn.Module | None, has_labels: bool
) -> tuple[str, ...]:
    """The metrics that samples of this shape can have."""
    names = [*ENDS] if has_teacher else []
    if len(shape) != 3:
        names += ["sliced_w2", "energy", "histogram_kl"] if tuple(shape) == (2,) else ["sliced_w2", "energy"]
    if extractor is not None:
        # A Frechet distance by another network is not FID: the name would make them look comparable.
        names += ["fid" if isinstance(extractor, Inception) else "fd", "kid", "precision", "recall"]
        names += ["accuracy"] if has_labels and hasattr(extractor, "classify") else []
    return tuple(names)


def choose_metrics(metrics: Sequence[str] | None, possible: Sequence[str]) -> tuple[str, ...]:
    """Those of ``possible`` that are asked for, all if ``metrics`` is None.

    Raises:
        ValueError: for a metric that is unknown or not possible, or if there is none at all.
    """
    for name in metrics or ():
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
        if name not in possible:
            raise ValueError(
                f"metric {name!r} cannot be had here, only {', '.join(possible) or 'none'}: rmse needs a teacher; fd, "
                "kid, precision and recall need images and an extractor (fid: FID's own), accuracy labels besides; "
                "the others need points (histogram_kl: in the plane)"
            )
    asked = possible if metrics is None else (*metrics, *(ENDS if "rmse" in metrics else ()))
    names = tuple(name for name in possible if name in asked)
    if not names:
        raise ValueError("there is nothing to measure: give a teacher, or for images an extractor")
    return names


class Judge:
    """Measures sets of samples against data, and against end points row by row.

    Args:
        names: the metrics that will be asked for.
        extractor: for images; None for points. decode: what makes images of samples and data, where those are none.

    Attributes:
        ends: where each of the first samples should end, (n, ...) on the CPU, or None.
        shown: the first rows of the data.
    """

    def __init__(
        self, names: Sequence[str], extractor: nn.Module | None, decode: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.decode = decode
        # As Any: whether it has ``classify`` was seen to when the metrics were chosen.
        self.extractor: Any = extractor
        self.compares = any(name not in (*ENDS, "accuracy") for name in names)
        self.ends: Tensor | None = None

    def learn(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """Take in the data; returns the conditions of all its rows."""
        views, conditions, shown = [], [], []
        for part in batches:
            views += self._view(part.data)
            conditions.append(part.cond)
            shown += [part.data] if sum(map(len, shown)) < _SHOWN else []
        self.real = torch.cat(views) if views else torch.empty(0)
        self.shown = torch.cat(shown)[:_SHOWN].cpu()
        if self.extractor is not None and views:
            self.statistics = FeatureStatistics.of(self.real)
        return {name: torch.cat([some[name] for some in conditions]) for name in conditions[0]}

    def measure(self, batches: Iterable[Batch], names: Sequence[str]) -> tuple[dict[str, float], Tensor]:
        """The metrics of samples, with what was asked of them as conditions; and the first of the samples."""
        views, shown, squares, away, right, done = [], [], 0.0, [], 0.0, 0
        where = self.ends if any(name in ENDS for name in names) else None
        for part in batches:
            x = part.data
            views += self._view(x)
            if where is not None:
                ends = where[done : done + len(x)]
                error = (x[: len(ends)].cpu().double() - ends.double()).square()
                squares += float(error.sum())
                away.append(error.flatten(1).sum(1).sqrt())
            if "accuracy" in names:
                right += accuracy(self.extractor, self._seen(x), part.cond["class_labels"]) * len(x)
            shown += [x.cpu()] if done < _SHOWN else []
            done += len(x)
        values = self._distances(torch.cat(views), names) if views else {}
        if where is not None:
            median, most = quantiles(torch.cat(away), (0.5, 0.99))
            values |= {"rmse": (squares / len(where)) ** 0.5, "error_median": median, "error_99": most}
        if "accuracy" in names:
            values["accuracy"] = right / done
        return {name: values[name] for name in names}, torch.cat(shown)[:_SHOWN]

    def _view(self, x: Tensor) -> list[Tensor]:
        """What of a batch is compared with the data: a list of one, or of none."""
        if not self.compares:
            return []
        return [x.cpu() if self.extractor is None else extract(self.extractor, self._seen(x))]

    def _seen(self, x: Tensor) -> Tensor:
        """What the extractor sees of samples."""
        return x if self.decode is None else self.decode(x.to(next(self.extractor.parameters()).device))

    def _distances(self, fake: Tensor, names: Sequence[str]) -> dict[str, float]:
        real, values = self.real, {}
        if "sliced_w2" in names:
            values["sliced_w2"] = sliced_wasserstein(fake[:_CLOUD], real[:_CLOUD])
        if "energy" in names:
            values["energy"] = energy_distance(fake[:_PAIRS], real[:_PAIRS])
        if "histogram_kl" in names:
            values["histogram_kl"] = histogram_kl(fake, real)
        if "fd" in names or "fid" in names:
            distance = frechet_distance(self.statistics, FeatureStatistics.of(fake))
            values["fid" if "fid" in names else "fd"] = distance
        if "kid" in names:
            values["kid"], _ = kid(real, fake, size=min(1000, len(real), len(fake)))
        if "precision" in names or "recall" in names:
            values["precision"], values["recall"] = precision_recall(real, fake)
        return values
