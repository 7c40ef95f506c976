"""Some classes of a data set."""

import pytest
import torch

from fewstep.common.randomness import generator
from fewstep.data import load_data


def test_only_the_rows_of_the_classes_that_are_named() -> None:
    every, some = load_data("digits"), load_data("digits", only=[3, "8"])
    labels = every.cond["class_labels"]  # type: ignore[attr-defined]
    assert some.size == int(((labels == 3) | (labels == 8)).sum())
    batch = some.rows(torch.arange(some.size or 0), generator(0))
    assert set(batch.cond["class_labels"].tolist()) == {3, 8}
    assert torch.equal(batch.cond["class_labels"], some.cond["class_labels"])  # type: ignore[attr-defined]
    assert some.source == {"name": "digits", "only": [3, "8"]}  # type: ignore[attr-defined]
    assert load_data("digits", only=3).size == int((labels == 3).sum())


def test_classes_that_are_not_there_are_refused() -> None:
    for only in ("eleven", 10, -1, True):
        with pytest.raises(ValueError, match="unknown class"):
            load_data("digits", only=only)
    with pytest.raises(ValueError, match="no class labels"):
        load_data("checkerboard", only=[1])
    with pytest.raises(ValueError, match="no class labels"):
        load_data("digits", only=[1], labels=False)
