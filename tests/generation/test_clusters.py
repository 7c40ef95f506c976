"""Clusters of a model's own features, against what is known of them."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fewstep
from fewstep.cli import main
from fewstep.common.randomness import generator
from fewstep.data.given import as_data
from fewstep.generation.clusters import cluster, kmeans, mutual_information, write_labelled
from fewstep.networks import MLP


def corners(rows: int = 800) -> tuple[Tensor, Tensor]:
    """Four Gaussians at the corners of a square, and which one each row is of; 40, 30, 20 and 10 %."""
    labels = torch.tensor([3, 1, 0, 2])[
        torch.bucketize(torch.rand(rows, generator=generator(0)), torch.tensor([0.4, 0.7, 0.9]))
    ]
    centres = torch.tensor([[2.0, 2.0], [-2.0, 2.0], [2.0, -2.0], [-2.0, -2.0]])
    return centres[labels] + 0.2 * torch.randn(rows, 2, generator=generator(1)), labels


def data_of(rows: Tensor, labels: Tensor | None = None) -> Any:
    return as_data(rows if labels is None else TensorDataset(rows, labels))


@pytest.mark.parametrize(
    ("a", "b", "value"),
    [
        ([0, 0, 1, 1], [1, 1, 0, 0], 1.0),
        ([0, 0, 1, 1], [0, 1, 0, 1], 0.0),
        ([0, 0, 1, 1], [0, 1, 2, 3], 2 * math.log(2) / (math.log(2) + math.log(4))),
        ([5, 5, 5], [2, 2, 2], 1.0),
        ([7, 7, 9, 9], [0, 0, 0, 0], 0.0),
    ],
)
def test_mutual_information_is_that_of_the_formula(a: list[int], b: list[int], value: float):
    a_, b_ = torch.tensor(a), torch.tensor(b)
    assert mutual_information(a_, b_) == pytest.approx(value, abs=1e-12)
    assert mutual_information(b_, a_) == pytest.approx(value, abs=1e-12)


def test_kmeans_is_the_best_of_its_starts_and_has_no_empty_cluster():
    rows, labels = corners()
    assert mutual_information(kmeans(rows, 4), labels) == 1
    assert torch.equal(kmeans(rows, 4, seed=3), kmeans(rows, 4, seed=3))
    with pytest.raises(ValueError, match="3 clusters of 50 rows: one stays empty, from 2 starts: ask for fewer"):
        kmeans(torch.ones(50, 2), 3, attempts=2)


def test_clusters_of_an_untrained_network_say_which_rows_they_are_of():
    """A mixture so far apart is told by any features; numbers go by size."""
    torch.manual_seed(0)
    field = fewstep.NetworkField(MLP(2, width=64, depth=4))
    rows, labels = corners()
    found = cluster(field, data_of(rows, labels), 4)
    assert found.layer == "hidden.1"
    assert found.agreement is not None
    assert found.agreement > 0.9
    assert found.sizes.tolist() == sorted(found.sizes.tolist(), reverse=True)
    assert found.sizes.sum() == len(rows)
    assert torch.equal(found.labels.bincount(minlength=4), found.sizes)
    again = cluster(field, data_of(rows), 4)
    assert torch.equal(again.labels, found.labels)
    assert again.agreement is None
    assert cluster(field, data_of(rows), 4, layer="hidden.0").layer == "hidden.0"


def test_noise_is_on_the_data_at_the_time_that_is_asked():
    seen: list[tuple[Tensor, Tensor]] = []

    class Watched(MLP):
        def forward(self, x: Tensor, *times: Tensor, **cond: Any) -> Tensor:
            seen.append((x, times[0]))
            return super().forward(x, *times, **cond)

    field = fewstep.NetworkField(Watched(2, width=8, depth=2))
    rows, _ = corners(4000)
    cluster(field, data_of(rows), 2, at=0.7, attempts=1)
    x, t = (torch.cat(parts) for parts in zip(*seen[1:], strict=True))  # the first looks for the layer
    assert (t == 0.7).all()
    assert float((x - 0.7 * rows).std()) == pytest.approx(0.3, rel=0.03)


def test_what_does_not_fit_is_refused():
    field, (rows, _) = fewstep.NetworkField(MLP(2, width=8, depth=2)), corners(40)
    data = data_of(rows)
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (fewstep.CheckerboardField(), {}, "a CheckerboardField has no network"),
        (fewstep.NetworkField(MLP(2, classes=3)), {}, "needs class_labels already"),
        (field, {"at": 1.0}, r"at is 1: .*\(0, 1\)"),
        (field, {"layer": "midle"}, "unknown layer of the network 'midle'"),
    ]
    for model, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            cluster(model, data, 4, **options)
    for count in (1, 41):
        with pytest.raises(ValueError, match=f"{count} clusters of 40 rows: 2 at least"):
            cluster(field, data, count)
    with pytest.raises(ValueError, match="without end"):
        cluster(field, fewstep.load_data("checkerboard"), 4)
    with pytest.raises(ValueError, match="one stays empty"):
        cluster(fewstep.NetworkField(_Blind()), data, 4, layer="body", attempts=1)


class _Blind(nn.Module):
    """A network whose features are the same whatever it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 3)
        nn.init.zeros_(self.body.weight)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(x)[:, :2]


def test_labels_are_written_with_the_data_that_they_are_of(tmp_path: Path):
    images = torch.randint(256, (12, 3, 8, 8), generator=generator(0)).byte()
    data = as_data(TensorDataset(images.float() / 127.5 - 1, torch.zeros(12, dtype=torch.long)))
    for name, rows in (("images", data), ("points", data_of(corners(12)[0]))):
        write_labelled(rows, torch.arange(12) % 4, tmp_path / f"{name}.npz")
        again = fewstep.load_data(tmp_path / f"{name}.npz").rows(torch.arange(12), generator(0))
        torch.testing.assert_close(again.data, rows.rows(torch.arange(12), generator(0)).data)
        assert again.cond["class_labels"].tolist() == [0, 1, 2, 3] * 3
    with np.load(tmp_path / "images.npz") as archive:
        assert archive["data"].dtype == np.uint8


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(
        "import fewstep\nfrom fewstep.networks import MLP\n"
        "def field(): return fewstep.NetworkField(MLP(2, width=16, depth=3))\n"
        "def a_map(): return fewstep.FlowMap(MLP(2, width=16, times=2))\n"
    )
    np.savez("points.npz", data=corners(200)[0].numpy(), class_labels=corners(200)[1].numpy())
    told = "cluster own.py:field --data points.npz --clusters 4 --out by-cluster.npz --attempts 2 --trust"
    assert main(told.split()) == 0
    out, err = capsys.readouterr()
    assert "by-cluster.npz: 200 rows in 4 clusters of" in out
    assert re.search(r"mutual information with the labels that the data have: (1\.000|0\.9\d\d)", out)
    assert "class_labels: 4" in out + err
    found = fewstep.load_data("by-cluster.npz")
    assert found.size == 200
    for words, message in (
        (told.replace(".npz --attempts", " --attempts"), "--out by-cluster: data and labels are written to one file"),
        (told.replace("own.py:field", "own.py:a_map"), "own.py:a_map is a flow map"),
        (told.replace("own.py:field", "checkerboard"), "a CheckerboardField has no network"),
        (told.replace("points.npz", "gone.npz"), "no data at gone.npz"),
        (told.replace("--clusters 4", "--clusters 400"), "400 clusters of 200 rows"),
    ):
        assert main(words.split()) == 2
        assert message in capsys.readouterr().err
