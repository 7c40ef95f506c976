"""Measures samples that come batch by batch, from one process or several. What is kept of them is bounded, whatever
their number: moments of features, and the first rows for metrics that compare rows with each other."""

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.common.distributed import World
from fewstep.common.errors import unknown
from fewstep.common.sharing import in_turn
from fewstep.data.batch import Batch
from fewstep.evaluation.copies import SHARE, comparable, nearness
from fewstep.evaluation.extractor import accuracy, extract
from fewstep.evaluation.features import frechet_distance, kid, precision_recall
from fewstep.evaluation.inception import Inception
from fewstep.evaluation.inputs import Parts
from fewstep.evaluation.kept import ROWS, Features, Look, is_summed, kept_rows
from fewstep.evaluation.likelihoods import LIKELIHOODS
from fewstep.evaluation.points import energy_distance, histogram_kl, outside, quantiles, sliced_wasserstein
from fewstep.evaluation.tokens import METRICS as OF_TOKENS
from fewstep.evaluation.tokens import bigram_kl, entropy, spelling
from fewstep.evaluation.variety import WHOLE, Compared

# Of the distances to the end points, row by row: their root mean square, their median, and what 99 % are below.
ENDS = ("rmse", "error_median", "error_99")
METRICS = (
    *ENDS, "sliced_w2", "energy", "histogram_kl", "outside", "fd", "fid", "feature_w2", "kid", "precision", "recall",
    "accuracy", "diversity", "memorisation", *OF_TOKENS, *LIKELIHOODS,
)  # fmt: skip
MANY = 16  # steps that a teacher needs at least to say how diverse samples should be
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
    """What a set of samples came to, on the main process: the metrics, but ``diversity``, which is the ratio of the
    ``spread`` of two sets (see ``variety.spreads``); and the first of the samples."""

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
        world: the processes that look at batches; the main one measures.

    Attributes:
        ends: where the samples of this process should end, (n, ...) on the CPU, by the first one of a batch.
        shown: the first rows of the data.
        training: rows trained on, where ``memorisation`` is asked for.
    """

    def __init__(
        self,
        names: Sequence[str],
        extractor: nn.Module | None,
        decode: Callable[[Tensor], Tensor] | None = None,
        inside: Callable[[Tensor], Tensor] | None = None,
        is_by_class: bool = False,
        text: Any = None,
        world: World | None = None,
    ) -> None:
        self.decode, self.inside, self.is_by_class, self.text = decode, inside, is_by_class, text
        self.world = World() if world is None else world
        # As Any: whether it has ``classify`` was seen to when the metrics were chosen.
        self.extractor: Any = extractor
        self.names = names
        self.ends: dict[int, Tensor] = {}
        self.training = torch.empty(0)

    def learn(self, parts: Parts, training: Parts | None = None) -> dict[str, Tensor]:
        """Take in the data, and for ``memorisation`` the rows trained on; returns the conditions of all rows of the
        data."""
        conditions: list[dict[str, Tensor]] = []

        def look(rows: range) -> Look:
            part = parts.make(rows)
            conditions.append(part.cond)
            raw = comparable(part.data) if training is not None and rows.start < _HELD_OUT else None
            return Look(part.data[: max(_SHOWN - rows.start, 0)].cpu(), self._view(part.data, rows, names), raw=raw)

        names = [name for name in self.names if name != "diversity"]
        self.shown, self.real, held_out = torch.empty(0), Features(names), []
        for found in in_turn(parts.ranges, look, self.world):
            if found.view is not None:
                self.real.add(found.view)
            self.shown = found.shown if not len(self.shown) else self.shown
            held_out += [] if found.raw is None else [found.raw]
        if training is not None:
            rows = list(in_turn(training.ranges, lambda rows: comparable(training.make(rows).data), self.world))
            if self.world.is_main:
                self.training = torch.cat(rows)
                (self.near,) = quantiles(nearness(torch.cat(held_out)[:_HELD_OUT], self.training), (SHARE,))
        turns = zip_longest(*self.world.gather(conditions))
        told = [cond for turn in turns for cond in turn if cond is not None]
        return {name: torch.cat([some[name] for some in told]) for name in told[0]}

    def measure(self, parts: Parts, names: Sequence[str]) -> Measured:
        """The metrics of samples, with what was asked of them as conditions."""
        features, compared, shown, squares, raw = Features(names), Compared(), [], [], []
        right = away = 0.0
        for found in in_turn(parts.ranges, lambda rows: self._look(parts.make(rows), rows, names), self.world):
            if found.view is not None:
                features.add(found.view)
                if "diversity" in names:
                    compared.add(found.view, found.labels)
            shown += [found.shown] if len(found.shown) else []
            squares += [] if found.squares is None else [found.squares]
            raw += [] if found.raw is None else [found.raw]
            right, away = right + found.right, away + found.outside
        if not self.world.is_main:
            return Measured({}, {}, torch.empty(0))
        values: dict[str, float | None] = dict(self._distances(features, names))
        if squares:
            error = torch.cat(squares).sqrt()
            median, most = quantiles(error, (0.5, 0.99))
            values |= {"rmse": float(torch.cat(squares).mean().sqrt()), "error_median": median, "error_99": most}
        if "accuracy" in names:
            values["accuracy"] = right / parts.count
        if "outside" in names:
            values["outside"] = away / parts.count
        if "memorisation" in names:
            is_near = nearness(torch.cat(raw), self.training) <= self.near
            values["memorisation"] = float(is_near.double().mean())
        spread = compared.spreads() if "diversity" in names else {}
        return Measured({name: values.get(name) for name in names}, spread, torch.cat(shown))

    def spread(self, parts: Parts) -> float:
        """How far samples, all asked for the same, are from each other, on the main process."""
        compared = Compared()
        for view in in_turn(parts.ranges, lambda rows: self._seen_as(parts.make(rows).data), self.world):
            compared.add(view)
        return compared.spreads()[0] if self.world.is_main else 0.0

    def _look(self, part: Batch, rows: range, names: Sequence[str]) -> Look:
        x, ends = part.data, self.ends.get(rows.start) if any(name in ENDS for name in names) else None
        squares = None if ends is None else (x[: len(ends)].cpu().double() - ends.double()).square().flatten(1).sum(1)
        right = away = 0.0
        if "accuracy" in names:
            right = accuracy(self.extractor, self._seen(x), part.cond["class_labels"]) * len(x)
        if "outside" in names and self.inside is not None:
            away = outside(x.cpu(), self.inside) * len(x)
        raw = comparable(x[: _COPIES - rows.start]) if "memorisation" in names and rows.start < _COPIES else None
        labels = part.cond["class_labels"].cpu() if "diversity" in names and self.is_by_class else None
        shown = x[: max(_SHOWN - rows.start, 0)].cpu()
        return Look(shown, self._view(x, rows, names), squares, right, away, raw, labels)

    def _view(self, x: Tensor, rows: range, names: Sequence[str]) -> Tensor | None:
        """What of a batch is compared with the data, or with other samples; None where nothing is."""
        is_apart = "diversity" in names and (self.is_by_class or rows.start < WHOLE)
        return self._seen_as(x) if is_apart or is_summed(names) or rows.start < kept_rows(names) else None

    def _seen_as(self, x: Tensor) -> Tensor:
        """What samples are compared by: their features, their tokens, or they themselves."""
        if self.text is not None:
            return x.argmax(-1).cpu()
        return x.cpu() if self.extractor is None else extract(self.extractor, self._seen(x))

    def _seen(self, x: Tensor) -> Tensor:
        """What the extractor sees of samples."""
        return x if self.decode is None else self.decode(x.to(next(self.extractor.parameters()).device))

    def _distances(self, features: "Features", names: Sequence[str]) -> dict[str, float]:
        values: dict[str, float] = {}
        if features.statistics is not None and self.real.statistics is not None:
            distance = frechet_distance(self.real.statistics, features.statistics)
            values["fid" if "fid" in names else "fd"] = distance
        if not any(name in ROWS for name in names):
            return values

        def pair(name: str) -> tuple[Tensor, Tensor]:
            return fake[: ROWS[name]], real[: ROWS[name]]

        fake, real = features.rows(), self.real.rows()
        if self.text is not None:
            symbols, size = self.text.symbols, len(self.text.symbols)
            values |= {"bigram_kl": bigram_kl(*pair("bigram_kl"), size), "entropy": entropy(fake, size)}
            values["spelling"] = spelling(fake, symbols, self.text.words)
            return {name: value for name, value in values.items() if name in names}
        for name, distance in (("sliced_w2", sliced_wasserstein), ("energy", energy_distance)):
            if name in names:
                values[name] = distance(*pair(name))
        if "histogram_kl" in names:
            values["histogram_kl"] = histogram_kl(*pair("histogram_kl"))
        if "feature_w2" in names:
            rows = min(len(fake), len(real), ROWS["feature_w2"])
            values["feature_w2"] = sliced_wasserstein(fake[:rows], real[:rows])
        if "kid" in names:
            some, others = pair("kid")
            values["kid"], _ = kid(others, some, size=min(1000, len(some), len(others)))
        if "precision" in names or "recall" in names:
            some, others = pair("precision")
            values["precision"], values["recall"] = precision_recall(others, some)
        return values
