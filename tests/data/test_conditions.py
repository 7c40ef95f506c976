"""Conditions left out now and then, and strengths of guidance drawn."""

import pytest
import torch

from fewstep.data import ArrayData
from fewstep.data.batch import Data
from fewstep.data.conditions import Dropped, Strengths

LABELS = torch.arange(6000) % 10
TEXT = torch.randn(6000, 4, 3)
DATA = ArrayData(torch.zeros(6000, 2), {"class_labels": LABELS.numpy(), "text": TEXT.numpy()})
INDEX = torch.arange(6000)


def test_a_share_of_the_rows_goes_without_all_its_named_conditions() -> None:
    none = torch.full((4, 3), 7.0)
    dropped = Dropped(DATA, 0.25, {"class_labels": 10, "text": none})
    batch = dropped.rows(INDEX, torch.Generator().manual_seed(0))
    out = batch.cond["class_labels"] == 10
    assert abs(float(out.float().mean()) - 0.25) < 0.02
    assert batch.cond["class_labels"].dtype == torch.int64
    assert (batch.cond["text"][out] == none).all()
    assert torch.equal(batch.cond["text"][~out], TEXT[~out])
    assert torch.equal(batch.cond["class_labels"][~out], LABELS[~out])
    again = dropped.rows(INDEX, torch.Generator().manual_seed(0))
    assert torch.equal(again.cond["class_labels"], batch.cond["class_labels"])
    assert not torch.equal(dropped.rows(INDEX, torch.Generator().manual_seed(1)).cond["class_labels"] == 10, out)


def test_what_is_not_named_stays_and_so_does_the_data() -> None:
    dropped = Dropped(DATA, 1.0, {"class_labels": 10})
    batch = dropped.rows(INDEX[:5], torch.Generator())
    assert (batch.cond["class_labels"] == 10).all()
    assert torch.equal(batch.cond["text"], TEXT[:5])
    assert isinstance(dropped, Data)
    assert (dropped.shape, dropped.size) == ((2,), 6000)
    # Who judges asks for the conditions as they are.
    assert torch.equal(dropped.cond["class_labels"], LABELS)
    assert torch.equal(Dropped(DATA, 0.0, {"class_labels": 10}).rows(INDEX, torch.Generator()).cond["text"], TEXT)


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"share of 1.5 of the rows: it lies in \[0, 1\]"):
        Dropped(DATA, 1.5, {"class_labels": 10})
    with pytest.raises(ValueError, match=r"say null, as in \{class_labels: 10\}"):
        Dropped(DATA, 0.1, {})
    with pytest.raises(ValueError, match="no condition 'label' to drop, the data has class_labels, text"):
        Dropped(DATA, 0.1, {"label": 10})


def test_strengths_are_uniform_and_the_rest_stays() -> None:
    data = Strengths(DATA, 1.0, 3.0)
    batch = data.rows(INDEX, torch.Generator().manual_seed(0))
    strengths = batch.cond["guidance"].sort().values
    assert (strengths - torch.linspace(1, 3, 6000)).abs().max() < 0.05
    assert torch.equal(batch.cond["class_labels"], LABELS)
    assert set(data.cond) == {"class_labels", "text", "guidance"}
    assert (data.shape, data.size) == ((2,), 6000)
    assert isinstance(data, Data)
    with pytest.raises(ValueError, match=r"run from 3.0 to 1.0: the first is the smaller"):
        Strengths(DATA, 3.0, 1.0)
    with pytest.raises(ValueError, match="the data has a condition guidance, which would be drawn anew"):
        Strengths(data, 1.0, 3.0)
