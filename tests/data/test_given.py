"""What Python gives for data, teachers and networks: taken as everybody has it, or refused with the way out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from toys.first_hour import write_ddpm

import fewstep
from fewstep.data.couplings import Coupled
from fewstep.data.given import as_data
from fewstep.flows.fields import NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear
from fewstep.flows.preconditioned import Preconditioned
from fewstep.flows.schedules import kind_of
from fewstep.networks import MLP

ROWS = torch.randn(12, 2)
LABELS = torch.arange(12) % 3


class Mapped(Dataset[Any]):
    def __init__(self, item: Any) -> None:
        self.item = item

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return self.item(index)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(ROWS)


@pytest.mark.takes_seconds
@pytest.mark.parametrize(
    ("data", "has_labels"),
    [
        (ROWS, False),
        (ROWS.numpy(), False),
        (TensorDataset(ROWS), False),
        (TensorDataset(ROWS, LABELS), True),
        (DataLoader(TensorDataset(ROWS, LABELS), batch_size=5, shuffle=True), True),
        (Mapped(lambda i: ROWS[i]), False),
        (Mapped(lambda i: (ROWS[i], int(LABELS[i]))), True),
        (Mapped(lambda i: (ROWS[i].numpy(), LABELS[i])), True),
        (DataLoader(Mapped(lambda i: ROWS[i]), batch_size=3), False),
    ],
)
def test_what_holds_the_rows_does_not_matter(data: Any, has_labels: bool) -> None:
    """The same rows, the same seed: the same bits."""
    batch = as_data(data).rows(torch.tensor([3, 1]), torch.Generator())
    assert torch.equal(batch.data, ROWS[[3, 1]])
    assert ("class_labels" in batch.cond) == has_labels
    if has_labels:
        assert torch.equal(batch.cond["class_labels"], LABELS[[3, 1]])
        return
    trained = []
    for given in (ROWS, data):
        torch.manual_seed(0)
        student = FlowMap(MLP(2, width=8, depth=1, times=2))
        trained.append(fewstep.fit(student, fewstep.MeanFlow(), given, steps=2, batch=4, quiet=True, device="cpu"))
    weights = [list(result.student.parameters()) for result in trained]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("data", [Endless(), DataLoader(Endless()), [ROWS], {"data": ROWS}, "checkerboard", 3])
def test_other_things_are_refused_with_what_is_taken(data: Any) -> None:
    with pytest.raises(ValueError, match="TensorDataset, a map-style Dataset or the DataLoader") as refused:
        fewstep.fit(FlowMap(MLP(2, times=2)), fewstep.MeanFlow(), data, steps=1)
    assert len(str(refused.value)) < 400


def test_items_that_are_no_tensors_are_named() -> None:
    with pytest.raises(ValueError, match=r"item 0 of the Mapped is a str: a tensor, or \(tensor, label\)"):
        as_data(Mapped(lambda i: "x"))


def test_few_rows_get_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    student = FlowMap(MLP(2, width=8, depth=1, times=2))
    fewstep.fit(student, fewstep.MeanFlow(), ROWS[:10], steps=1, batch=64, device="cpu")
    assert "note: 10 rows of data and batch=64: each update sees each row about 6.4 times" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "kind"), [("epsilon", "noise"), ("sample", "data"), ("v_prediction", "v"), ("flow_prediction", "flow")]
)
def test_diffusers_names_of_predictions_are_known(name: str, kind: str) -> None:
    assert NetworkField(MLP(2), Linear(), name).prediction == kind
    assert FlowMap(MLP(2, times=2), Linear(), name).prediction == kind
    assert kind_of("epsilon", Preconditioned()) == "edm"


class Net(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x


def test_what_is_no_field_is_refused_with_the_way_to_one() -> None:
    unet: Any = UNet2DModel(
        sample_size=8, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    for make in (fewstep.ITVM, FlowMap.from_field, fewstep.PFMM):
        with pytest.raises(ValueError, match=r"is a UNet2DModel.*DiffusionField\(fewstep\.networks\.UNet\(model\)"):
            make(unet)
        with pytest.raises(ValueError, match=r"is a Net, .*NetworkField\(network, path, prediction\)"):
            make(Net())  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match=r"is a FlowMap, .*the field that it was made from"):
            make(FlowMap(MLP(2, times=2)))  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match=r"is a str, .*fewstep\.load makes one"):
            make("./my-ddpm")


def test_a_pipeline_in_memory_is_loaded_as_from_its_folder(tmp_path: Path) -> None:
    write_ddpm(tmp_path / "my-ddpm")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "my-ddpm")
    field, saved = fewstep.load(pipeline), fewstep.load(tmp_path / "my-ddpm")
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(field.velocity(x, 0.3), saved.velocity(x, 0.3))
    with pytest.raises(ValueError, match="a UNet2DModel is no folder, name or pipeline"):
        fewstep.load(pipeline.unet)
    bad = DDPMPipeline(pipeline.unet, DDPMScheduler(prediction_type="epsilon", rescale_betas_zero_snr=True))
    with pytest.raises(ValueError, match="signal"):
        fewstep.load(bad)


def test_arrays_of_pictures_have_their_channels_first() -> None:
    assert as_data(np.zeros((4, 8, 8), np.uint8)).shape == (1, 8, 8)
    assert Coupled(ROWS).shape == (2,)  # around data that Python gives, too
    with pytest.raises(ValueError, match="channels last"):
        as_data(np.zeros((4, 8, 8, 3), np.uint8))
