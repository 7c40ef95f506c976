"""The page for those who come from another library: its networks, keys and equations are what it says."""

import inspect
import re
from typing import Any

import pytest
import torch
from toys.places import ROOT

import fewstep
from fewstep.data.images import image_folder
from fewstep.runs.recipe import Recipe

PAGE = (ROOT / "docs" / "guides" / "coming-from.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the blocks of the page make, all but the one that needs an export."""
    names: dict[str, Any] = {}
    for block in BLOCKS:
        if "from_pretrained" not in block:
            exec(compile(block, "coming-from.md", "exec"), names)
    return names


def test_states_and_velocities_are_those_of_the_straight_line(names: dict[str, Any]) -> None:
    x0, x1, t = names["x0"], names["x1"], names["t"][:, None]
    assert torch.equal(names["xt"], t * x1 + (1 - t) * x0)
    assert torch.equal(names["ut"], x1 - x0)
    assert torch.equal(names["x_t"], names["xt"])
    assert names["samples"].shape == x0.shape


def test_a_network_of_meanflow_takes_its_one_step(names: dict[str, Any]) -> None:
    assert torch.equal(names["ours"], names["theirs"])
    assert not torch.equal(names["ours"], names["z"])


def test_the_residual_of_meanflow_is_ours_with_the_other_sign(names: dict[str, Any]) -> None:
    net, student = names["net"].double(), names["student"].double()
    data, noise = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    t = 0.5 + 0.5 * torch.rand(4, dtype=torch.float64)
    r = t * torch.rand(4, dtype=torch.float64)
    wide = (-1, 1, 1, 1)
    z = (1 - t.view(wide)) * data + t.view(wide) * noise

    v, one = noise - data, torch.ones_like(t)
    u, du = torch.func.jvp(lambda z, t: net(z, (t, t - r)), (z, t), (v, one))
    theirs = u - (v - (t - r).view(wide) * du)

    average = lambda x, s: student.average_velocity(x, s, 1 - r)  # noqa: E731
    u, du = torch.func.jvp(average, (z, 1 - t), (-v, one))
    ours = u - (-v + (t - r).view(wide) * du)
    torch.testing.assert_close(ours, -theirs, rtol=1e-10, atol=1e-10)
    assert ours.abs().max() > 0.1


def test_every_key_that_is_named_is_one_of_a_recipe() -> None:
    named = set(re.findall(r"`((?:teacher|student|data|training|evaluation|objective)\.[a-z_.]+)", PAGE))
    assert len(named) > 20
    for key in named:
        section, *rest = key.split(".")
        if section in ("objective", "data"):
            known = set(inspect.signature(image_folder).parameters) if section == "data" else set()
            for method in (fewstep.ConsistencyDistillation, fewstep.MeanFlow) if section == "objective" else ():
                known |= set(inspect.signature(method).parameters)
            assert rest[0] in known, key
            continue
        model: Any = Recipe
        for name in (section, *rest):
            model = _model(model)
            assert name in model.model_fields, key
            model = model.model_fields[name].annotation


def _model(annotation: Any) -> Any:
    """The section that an annotation such as ``Lora | None`` is of."""
    if hasattr(annotation, "model_fields"):
        return annotation
    return next(part for part in annotation.__args__ if hasattr(part, "model_fields"))
