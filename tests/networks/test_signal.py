"""A network for signals: what a place sees, numbers that are told, a student that starts as its teacher, runs."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fewstep
from fewstep import FlowMap, FlowMatching, Guided, NetworkField, fit, load, sample
from fewstep.cli import main
from fewstep.data import ArrayData
from fewstep.flows.signature import classes_of, shape_of, takes
from fewstep.networks import Conv1dNet
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run

NAN = float("nan")


def test_a_place_sees_forty_to_both_sides() -> None:
    torch.manual_seed(0)
    network = Conv1dNet(2, 128, width=8).double()
    for block in network.blocks:
        block.norms = nn.ModuleList([nn.Identity(), nn.Identity()])  # the norms know how large all places are
    x = torch.randn(1, 2, 128, dtype=torch.float64, requires_grad=True)
    network(x, torch.full((1,), 0.3, dtype=torch.float64))[0, :, 64].sum().backward()
    assert x.grad is not None
    seen = x.grad.abs().sum(1)[0].nonzero()[:, 0]
    assert (int(seen.min()), int(seen.max())) == (24, 104)


def test_a_number_that_is_not_known_is_nan_and_a_student_starts_as_its_teacher() -> None:
    torch.manual_seed(0)
    network = Conv1dNet(2, 9, width=16, depth=2, vector=3)
    x, t, told = torch.randn(4, 2, 9), torch.rand(4), torch.randn(4, 3)
    nothing, some = torch.full((4, 3), NAN), told.clone()
    some[:, 1] = NAN
    with torch.no_grad():
        assert torch.equal(network(x, t), network(x, t, vector=nothing))
        assert len({float(network(x, t, vector=v).sum()) for v in (told, some, nothing, 0 * told)}) == 4
        first: Any = network.vector
        # Nothing of a number that is not known is left: the columns of its value and of its waves.
        first[0].weight[:, [1, *range(7, 24, 3)]] = 1e9
        assert network(x, t, vector=some).abs().max() < 1e3
        field = NetworkField(network)
        student = FlowMap.from_field(field, guidance=True)
        strength = torch.full((4,), 2.0)
        velocity = student.velocity(x, t, vector=some, guidance=strength)
        assert torch.equal(velocity, field(x, t, vector=some))
        guided = Guided(field, 2.5, null={"vector": NAN})
        both = field(x, t, vector=nothing) + 2.5 * (field(x, t, vector=some) - field(x, t, vector=nothing))
        torch.testing.assert_close(guided(x, t, vector=some), both)
    assert (shape_of(field), classes_of(field), takes(student, "guidance"), takes(field, "guidance")) == (
        (2, 9), 0, True, False,
    )  # fmt: skip
    classes = NetworkField(Conv1dNet(2, 9, width=8, depth=1, classes=3))
    assert classes_of(classes) == 3
    with pytest.raises(ValueError, match=r"class_labels \(B,\) are needed"):
        classes(x, t)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"width": 20}, "width 20: it is a multiple of 8, such as 16"),
        ({"depth": 0}, "depth 0: 1 to 1,000"),
        ({"guidance": "interval"}, "guidance: true"),
    ],
)
def test_a_network_that_cannot_be_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Conv1dNet(2, 9, **options)


def test_other_signals_and_numbers_are_refused() -> None:
    network, x, t = Conv1dNet(2, 9, width=8, depth=1), torch.randn(4, 2, 9), torch.rand(4)
    for call, why in (
        (lambda: network(x[:, :, :8], t), r"for signals \(2, 9\) was given \(2, 8\)"),
        (lambda: network(x, t, t), "times=1 was called with 2"),
        (lambda: network(x, t, vector=x[:, 0]), r"vector of shape \(4, 9\) for a Conv1dNet made with vector=0"),
        (lambda: network(x, t, guidance=t), "takes no strength of guidance"),
    ):
        with pytest.raises(ValueError, match=why):
            call()


@pytest.mark.takes_seconds
def test_one_call_of_the_map_draws_a_wave_where_an_euler_step_draws_a_mean() -> None:
    """Waves of either sign, whose size is told: their mean is 0, which is where one Euler step goes."""
    draw = torch.Generator().manual_seed(0)
    size = 0.5 + torch.rand(4000, 1, generator=draw)
    sign = torch.randint(2, (4000, 1, 1), generator=draw) * 2 - 1
    waves = size[:, None] * torch.sin(torch.arange(16) * (2 * math.pi / 16))
    data = ArrayData(sign * waves, {"vector": size})
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        field = NetworkField(Conv1dNet(1, 16, width=16, depth=3, vector=1))
    options: dict[str, Any] = {"batch": 64, "ema": None, "quiet": True, "device": "cpu"}
    fit(field, FlowMatching(), data, steps=200, lr=1e-2, **options)
    student = FlowMap.from_field(field)
    fit(student, fewstep.ITVM(field), data, steps=150, lr=5e-3, **options)
    noise = torch.randn(500, 1, 16, generator=draw)

    def off(model: Any) -> float:
        x = sample(model, noise, 1, vector=size[:500])
        both = torch.stack([(x - waves[:500]).square().mean((1, 2)), (x + waves[:500]).square().mean((1, 2))])
        return float(both.amin(0).sqrt().mean())

    assert off(field) > 0.5
    assert off(student) < 0.3


@pytest.mark.takes_seconds
def test_signals_of_a_file_are_trained_on_distilled_with_guidance_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    np.savez("signals.npz", plans=draw.normal(size=(32, 2, 12)), vector=draw.normal(size=(32, 3)))
    data: dict[str, Any] = {"name": "signals.npz", "key": "plans", "conditions": ["vector"]}
    few: dict[str, Any] = {"training": {"steps": 2, "batch": 16, "quiet": True}, "evaluation": {"count": 0}}
    recipe = {
        "name": "signals", "data": data, "objective": "FlowMatching", "drop": {"share": 0.25, "null": {"vector": NAN}},
        "student": {"network": "conv1d", "options": {"width": 8, "depth": 2, "vector": 3}}, **few,
    }  # fmt: skip
    assert load_recipe(recipe).as_dict()["drop"]["null"] == {"vector": "nan"}
    run(load_recipe(recipe), Path("teacher"))
    guidance = {"scale": 2, "range": [0, 3], "null": {"vector": "nan"}}
    teacher = {"source": "teacher", "guidance": guidance}
    run(load_recipe({"name": "fast", "teacher": teacher, "data": data, "objective": "ITVM", **few}), Path("fast"))
    asked = ["--steps", "1", "--guidance-scale", "1.5", "--count", "4", "--out", "x.npz"]
    assert main(["sample", "fast", *asked]) == 0
    found = np.load("x.npz")
    assert found["data"].shape == (4, 2, 12)
    np.testing.assert_allclose(found["vector"], np.load("signals.npz")["vector"][:4], rtol=1e-6)
    assert main(["export", "fast", "out"]) == 0
    assert "trust=True" not in Path("out/README.md").read_text()
    x, told = torch.randn(4, 2, 12), torch.from_numpy(found["vector"])
    models: list[Any] = [load("fast"), load("out")]
    assert torch.equal(*(sample(model, x, 2, vector=told, guidance=torch.full((4,), 3.0)) for model in models))
    capsys.readouterr()
    wrong = {**recipe, "name": "wrong", "data": {"name": "digits", "labels": False}, "drop": None}
    with pytest.raises(ValueError, match=r"conv1d takes signals \(C, L\), the data has shape \(1, 8, 8\): say unet"):
        run(load_recipe(wrong), Path("wrong"))
