"""Maps as programs of other runtimes: what eager gives, in batches of any size, by the code in their README."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from toys.families import MODELS, conditions, ddim, tiny_model
from toys.unet import tiny_student, tiny_unet

import fewstep
from fewstep.cli import main
from fewstep.flows.fields import DiffusionField, NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear, Trigonometric, VariancePreserving
from fewstep.flows.paths import Path as Trajectory
from fewstep.flows.tabulated import Tabulated
from fewstep.networks import FAMILIES, MLP, UNet
from fewstep.runs.runtimes import Counted, export_program

pytest.importorskip("onnxruntime")


def spoken(student: FlowMap) -> FlowMap:
    """With weights that say something about the second time."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in student.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return student.eval()


def points(native: Trajectory | None = None, prediction: str = "velocity", **options: Any) -> FlowMap:
    torch.manual_seed(0)
    guidance = options.pop("guidance", False)
    field = NetworkField(MLP(2, width=8, depth=2, **options), native, prediction, path=Linear())
    return spoken(FlowMap.from_field(field, guidance=guidance))


def run_torch(folder: Path, *inputs: Tensor) -> Tensor:
    return torch.export.load(folder / "map.pt2").module()(*inputs)


def run_onnx(folder: Path, **inputs: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "map.onnx")
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])


def times(rows: int) -> tuple[Tensor, Tensor]:
    return torch.linspace(0, 0.9, rows), torch.linspace(0.3, 1, rows)


@pytest.mark.takes_seconds
@torch.no_grad()
def test_a_torch_program_gives_what_eager_gives_in_any_batch(tmp_path: Path) -> None:
    model = points(Trigonometric(), "v", classes=3, guidance=True)
    done = export_program(model, tmp_path / "map", "torch")
    assert done.difference == 0
    assert done.largest_batch is None
    for rows in (1, 2, 7, 100):
        x, (s, t) = torch.randn(rows, 2), times(rows)
        labels, guidance = torch.arange(rows) % 3, torch.linspace(1, 4, rows)
        wanted = model(x, s, t, class_labels=labels, guidance=guidance)
        assert torch.allclose(run_torch(tmp_path / "map", x, s, t, labels, guidance), wanted, atol=1e-6)


@pytest.mark.takes_seconds
@torch.no_grad()
def test_an_onnx_program_gives_what_eager_gives_and_its_inputs_have_names(tmp_path: Path) -> None:
    # A diffusion schedule: the place in a table, and arithmetic in float64.
    model = points(Tabulated(tuple(np.linspace(4, -4, 50))), "noise", classes=3)
    done = export_program(model, tmp_path / "map")
    assert done.difference < 1e-5
    for rows in (1, 7, 100):
        x, (s, t), labels = torch.randn(rows, 2), times(rows), torch.arange(rows) % 3
        wanted = model(x, s, t, class_labels=labels)
        got = run_onnx(tmp_path / "map", x=x, s=s, t=t, class_labels=labels)
        assert torch.allclose(got, wanted, atol=1e-4, rtol=1e-4)
    config = json.loads((tmp_path / "map" / "config.json").read_text())
    assert config["inputs"] == {
        "x": {"dtype": "float32", "shape": ["batch", 2]},
        "s": {"dtype": "float32", "shape": ["batch"]},
        "t": {"dtype": "float32", "shape": ["batch"]},
        "class_labels": {"dtype": "int64", "shape": ["batch"]},
    }


@pytest.mark.takes_seconds
@torch.no_grad()
@pytest.mark.parametrize(("format", "gamma"), [("torch", 0.0), ("torch", 1.0), ("onnx", 0.0)])
def test_the_code_in_the_readme_samples_it(tmp_path: Path, format: str, gamma: float) -> None:
    model = points(classes=3)
    model.gamma = gamma
    export_program(model, tmp_path / "map", format)
    code = (tmp_path / "map" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done: dict[str, Any] = {}
    before = Path.cwd()
    os.chdir(tmp_path / "map")
    try:
        exec(code, done)
    finally:
        os.chdir(before)

    random = np.random.default_rng(0)
    x, labels = torch.from_numpy(random.standard_normal((4, 2), dtype=np.float32)), torch.zeros(4, dtype=torch.long)
    if gamma:
        fresh = torch.from_numpy(random.standard_normal((4, 2), dtype=np.float32))
        wanted = model(0.5 * model(x, 0.0, 1.0, class_labels=labels) + 0.5 * fresh, 0.5, 1.0, class_labels=labels)
    else:
        wanted = fewstep.sample(model, x, 2, class_labels=labels)
    assert torch.allclose(torch.from_numpy(done["x"]), wanted, atol=1e-5)


def test_a_place_in_a_table_is_counted_as_it_is_searched() -> None:
    table = tuple(np.sort(np.random.default_rng(0).normal(size=37))[::-1] * 3)
    values = torch.cat([torch.linspace(-12, 12, 1001, dtype=torch.float64), torch.tensor(table, dtype=torch.float64)])
    assert torch.equal(Counted(table).time_at(values), Tabulated(table).time_at(values))


@pytest.mark.takes_seconds
@torch.no_grad()
def test_a_unet_of_diffusers_takes_63_rows_as_it_looks_for_64(tmp_path: Path) -> None:
    model = tiny_student("flow")
    done = export_program(model, tmp_path / "map", "torch")
    assert done.largest_batch == 63
    x, (s, t) = torch.randn(63, 1, 8, 8), times(63)
    assert torch.allclose(run_torch(tmp_path / "map", x, s, t), model(x, s, t), atol=1e-5)
    assert "A call takes up to 63 rows." in (tmp_path / "map" / "README.md").read_text()


def of_family(name: str) -> tuple[FlowMap, dict[str, Tensor]]:
    is_flow = name in ("sd3", "flux")
    network = FAMILIES[MODELS[name][0]](tiny_model(name))
    if hasattr(network, "size"):
        network.size = 8
    field = DiffusionField(network, FlowMatchEulerDiscreteScheduler() if is_flow else ddim())
    return spoken(FlowMap.from_field(field)), conditions(name)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("format", ["torch", "onnx"])
@pytest.mark.parametrize("name", ["unet classes", "unet noise", "edm", "sd", "sdxl", "dit", "pixart", "sd3", "flux"])
def test_every_family_becomes_a_program(tmp_path: Path, name: str, format: str) -> None:
    cond: dict[str, Tensor] = {}
    if name == "unet classes":
        model = tiny_student("flow", classes=5)
    elif name == "unet noise":
        model = tiny_student("epsilon")
    elif name == "edm":
        model = spoken(FlowMap.from_field(DiffusionField(UNet(tiny_unet()), EDMEulerScheduler())))
    else:
        model, cond = of_family(name)
    given = {key: value for key, value in cond.items() if key != "class_labels"}
    done = export_program(model, tmp_path / "map", format, conditions=given)
    assert done.difference < (1e-6 if format == "torch" else 1e-4)
    is_unet = name in ("unet classes", "unet noise", "edm", "sd", "sdxl")
    assert done.largest_batch == (63 if is_unet and format == "torch" else None)
    rows = 66 if format == "onnx" else 5  # ONNX takes more rows than torch.export
    x, (s, t) = torch.randn(rows, *model.network.shape), times(rows)  # pyright: ignore
    cond = {key: value[torch.arange(rows) % len(value)] for key, value in cond.items()}
    if name == "unet classes":
        cond["class_labels"] = torch.arange(rows) % 5
    wanted = model(x, s, t, **cond)
    inputs = {"x": x, "s": s, "t": t, **cond}
    got = run_torch(tmp_path / "map", *inputs.values()) if format == "torch" else run_onnx(tmp_path / "map", **inputs)
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max().clamp(min=1)


class Counts(nn.Module):
    """A network that fixes the number of rows."""

    shape, classes = (2,), 0

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return self.layer(x).reshape(len(x), 2) * t[:, None]


class Looks(Counts):
    """A network that looks into its input."""

    def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return self.layer(x) if bool((t > 0.5).all()) else x


@pytest.mark.takes_seconds
def test_what_cannot_be_a_program_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(model: Any, match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            export_program(model, tmp_path / "map", **{"format": "torch", **options})
        assert list(tmp_path.iterdir()) == []

    refuse(NetworkField(MLP(2, width=8)), "NetworkField is no flow map")
    refuse(points(), "unknown format of a program 'onx': did you mean 'onnx'", format="onx")
    refuse(FlowMap.from_field(NetworkField(MLP(2, width=8), VariancePreserving())), "a map on VariancePreserving")
    refuse(of_family("sd")[0], "needs the condition encoder_hidden_states")
    refuse(FlowMap(Looks()), "torch.export cannot follow a map of a Looks")
    refuse(FlowMap(Counts()), "does not take 1 rows")
    monkeypatch.setattr("fewstep.runs.runtimes.TOLERANCE", -1.0)
    refuse(points(), "differs from the model by")
    assert capfd.readouterr().err == "", "torch prints graphs"


@pytest.mark.takes_seconds
def test_the_command_writes_a_program_of_an_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fewstep.export(points(), tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "map"), "--format", "torch"]) == 0
    said = capsys.readouterr().out
    assert "map.pt2 takes any number of rows, and differs from the model by 0.0e+00" in said
    files = {"map.pt2", "config.json", "README.md", "fewstep.json"}
    assert {file.name for file in (tmp_path / "map").iterdir()} == files
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "map"), "--format", "torch"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "map"), "--format", "onnx", "--adapter"]) == 2
    assert "--adapter" in capsys.readouterr().err
