"""Measures samples that come batch by batch: points are kept whole, of images little more than their features."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.common.errors import unknown
from fewstep.data.batch import Batch
from fewstep.evaluation.copies import SHARE, comparable, nearness
from fewstep.evaluation.extractor import accuracy, extract
from fewstep.evaluation.features import FeatureStatistics, frechet_distance, kid, precision_recall
from fewstep.evaluation.inception import Inception
from fewstep.evaluation.likelihoods import LIKELIHOODS
from fewstep.evaluation.points import energy_distance, histogram_kl, outside, quantiles, sliced_wasserstein
from fewstep.evaluation.tokens import METRICS as OF_TOKENS
from fewstep.evaluation.tokens import bigram_kl, entropy, spelling
from fewstep.evaluation.variety import spreads

# Of the distances to the end points, row by row: their root mean square, their median, and what 99 % are below.
ENDS = ("rmse", "error_median", "error_99")
METRICS = (
    *ENDS, "sliced_w2", "energy", "histogram_kl", "outside", "fd", "fid", "feature_w2", "kid", "precision", "recall",
    "accuracy", "diversity", "memorisation", *OF_TOKENS, *LIKELIHOODS,
)  # fmt: skip
MANY = 16  # steps that a teacher needs at least to say how diverse samples should be
_CLOUD = 16_000  # rows of a cloud that are sorted along every direction
_PAIRS = 5_000  # rows of which all pairs are compared
_HELD_OUT, _COPIES = 4_000, 1_000  # rows of the data, and samples, whose nearest training rows are looked for
_SHOWN = 64


def possible_metrics(
    shape: Sequence[int],
    has_teacher: bool,
    extractor: nn.Module | None,
    has_labels: bool,
    *,
    is_diverse: bool = False,
    has_edges: bool = False,
    has_training: bool = False,
    has_tokens: bool = False,
) -> tuple[str, ...]:
    """The metrics that samples of this shape can have.

    Args:
        is_diverse: there is a teacher of many steps. has_edges: where the data can lie is known (``inside``).
        has_training: the rows trained on are known, and are not those of the data. has_tokens: samples are rows of
        tokens, whose words are known.
    """
    if has_tokens:
        return (*OF_TOKENS, *(ENDS if has_teacher else ()))
    names = [*ENDS] if has_teacher else []
    if len(shape) != 3:
        names += ["sliced_w2", "energy", "histogram_kl"] if tuple(shape) == (2,) else ["sliced_w2", "energy"]
        names += ["outside"] if has_edges else []
    if extractor is not None:
        # A Frechet distance by another network is not FID: the name would make them look comparable.
        names += ["fid" if isinstance(extractor, Inception) else "fd", "feature_w2", "kid", "precision", "recall"]
        names += ["accuracy"] if has_labels and hasattr(extractor, "classify") else []
    names += ["diversity"] if is_diverse and (len(shape) != 3 or extractor is not None) else []
    return (*names, *(["memorisation"] if has_training else []))


def choose_metrics(
    metrics: Sequence[str] | None, possible: Sequence[str], on_request: Sequence[str] = ()
) -> tuple[str, ...]:
    """Those of ``possible`` that are asked for, all if ``metrics`` is None, and those of ``on_request`` by name alone.

    Raises:
        ValueError: for a metric that is unknown or not possible, or if there is none at all.
    """
    for name in metrics or ():
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
        if name not in (*possible, *on_request):
            raise ValueError(
                f"metric {name!r} cannot be had here, only {', '.join((*possible, *on_request)) or 'none'}: rmse needs "
                "a teacher; fd, feature_w2, kid, precision and recall need images and an extractor (fid: FID's own), "
                f"accuracy labels besides; diversity needs points or an extractor and {MANY} of teacher_steps or more, "
                "memorisation training rows that are not the data, outside a support with edges, bits_per_dim images; "
                "the others need points (histogram_kl: in the plane)"
            )
    asked = possible if metrics is None else (*metrics, *(ENDS if "rmse" in metrics else ()))
    names = (*(name for name in possible if name in asked), *(name for name in on_request if name in (metrics or ())))
    if not names:
        raise ValueError("there is nothing to measure: give a teacher, or for images an extractor")
    return names


class Measured(NamedTuple):
    """What a set of samples came to: the metrics, but ``diversity``, which is the ratio of the ``spread`` of two
    sets (see ``variety.spreads``); and the first of the samples."""

    values: dict[str, float | None]
    spread: dict[int, float]
    shown: Tensor


class Judge:
    """Measures sets of samples against data, and against end points row by row.

    Args:
        names: the metrics that will be asked for.
        extractor: for images; None for points. decode: what makes images of samples and data, where those are none.
        inside: which points (N, D) the data could have, (N,), for ``outside``.
        is_by_class: whether ``diversity`` is that of samples of one class, or of all.
        text: data of tokens, with their ``symbols`` and ``words``.

    Attributes:
        ends: where each of the first samples should end, (n, ...) on the CPU, or None.
        shown: the first rows of the data.
    """

    def __init__(
        self,
        names: Sequence[str],
        extractor: nn.Module | None,
        decode: Callable[[Tensor], Tensor] | None = None,
        inside: Callable[[Tensor], Tensor] | None = None,
        is_by_class: bool = False,
        text: Any = None,
    ) -> None:
        self.decode, self.inside, self.is_by_class, self.text = decode, inside, is_by_class, text
        # As Any: whether it has ``classify`` was seen to when the metrics were chosen.
        self.extractor: Any = extractor
        self.remembers = "memorisation" in names
        self.compares = any(name not in (*ENDS, "accuracy", "memorisation", *LIKELIHOODS) for name in names)
        self.ends: Tensor | None = None

    def learn(self, batches: Iterable[Batch], training: Iterable[Batch] = ()) -> dict[str, Tensor]:
        """Take in the data, and for ``memorisation`` the rows trained on; returns the conditions of all rows of the
        data."""
        views, conditions, shown, held_out = [], [], [], []
        for part in batches:
            views += self._view(part.data)
            conditions.append(part.cond)
            shown += [part.data] if sum(map(len, shown)) < _SHOWN else []
            if self.remembers and sum(map(len, held_out)) < _HELD_OUT:
                held_out.append(comparable(part.data))
        self.real = torch.cat(views) if views else torch.empty(0)
        self.shown = torch.cat(shown)[:_SHOWN].cpu()
        if self.extractor is not None and views:
            self.statistics = FeatureStatistics.of(self.real)
        if self.remembers:
            self.training = torch.cat([comparable(part.data) for part in training])
            (self.near,) = quantiles(nearness(torch.cat(held_out)[:_HELD_OUT], self.training), (SHARE,))
        return {name: torch.cat([some[name] for some in conditions]) for name in conditions[0]}

    def measure(self, batches: Iterable[Batch], names: Sequence[str]) -> Measured:
        """The metrics of samples, with what was asked of them as conditions."""
        views, shown, squares, away, right, done = [], [], 0.0, [], 0.0, 0
        labels, raw = [], []
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
            if "diversity" in names and self.is_by_class:
                labels.append(part.cond["class_labels"].cpu())
            if "memorisation" in names and done < _COPIES:
                raw.append(comparable(x[: _COPIES - done]))
            shown += [x.cpu()] if done < _SHOWN else []
            done += len(x)
        values: dict[str, float | None] = dict(self._distances(torch.cat(views), names) if views else {})
        if where is not None:
            median, most = quantiles(torch.cat(away), (0.5, 0.99))
            values |= {"rmse": (squares / len(where)) ** 0.5, "error_median": median, "error_99": most}
        if "accuracy" in names:
            values["accuracy"] = right / done
        if "memorisation" in names:
            is_near = nearness(torch.cat(raw), self.training) <= self.near
            values["memorisation"] = float(is_near.double().mean())
        spread = spreads(torch.cat(views), torch.cat(labels) if labels else None) if "diversity" in names else {}
        return Measured({name: values.get(name) for name in names}, spread, torch.cat(shown)[:_SHOWN])

    def spread(self, batches: Iterable[Batch]) -> float:
        """How far samples, all asked for the same, are from each other."""
        return spreads(torch.cat([view for part in batches for view in self._view(part.data)]))[0]

    def _view(self, x: Tensor) -> list[Tensor]:
        """What of a batch is compared with the data: a list of one, or of none."""
        if not self.compares:
            return []
        if self.text is not None:
            return [x.argmax(-1).cpu()]
        return [x.cpu() if self.extractor is None else extract(self.extractor, self._seen(x))]

    def _seen(self, x: Tensor) -> Tensor:
        """What the extractor sees of samples."""
        return x if self.decode is None else self.decode(x.to(next(self.extractor.parameters()).device))

    def _distances(self, fake: Tensor, names: Sequence[str]) -> dict[str, float]:
        real, values = self.real, {}
        if self.text is not None:
            symbols, size = self.text.symbols, len(self.text.symbols)
            values |= {"bigram_kl": bigram_kl(fake, real, size), "entropy": entropy(fake, size)}
            values["spelling"] = spelling(fake, symbols, self.text.words)
            return {name: value for name, value in values.items() if name in names}
        if "sliced_w2" in names:
            values["sliced_w2"] = sliced_wasserstein(fake[:_CLOUD], real[:_CLOUD])
        if "energy" in names:
            values["energy"] = energy_distance(fake[:_PAIRS], real[:_PAIRS])
        if "histogram_kl" in names:
            values["histogram_kl"] = histogram_kl(fake, real)
        if "outside" in names and self.inside is not None:
            values["outside"] = outside(fake, self.inside)
        if "fd" in names or "fid" in names:
            distance = frechet_distance(self.statistics, FeatureStatistics.of(fake))
            values["fid" if "fid" in names else "fd"] = distance
        if "feature_w2" in names:
            rows = min(len(fake), len(real), _CLOUD)
            values["feature_w2"] = sliced_wasserstein(fake[:rows], real[:rows])
        if "kid" in names:
            values["kid"], _ = kid(real, fake, size=min(1000, len(real), len(fake)))
        if "precision" in names or "recall" in names:
            values["precision"], values["recall"] = precision_recall(real, fake)
        return values
