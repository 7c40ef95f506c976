"""Autoguidance with the strength given to the student: by recipe, from end to end."""

import pytest
import torch

from fewstep.cli import main
from fewstep.flows.exact import eight_gaussians
from fewstep.flows.guided import Guided
from fewstep.networks import MLP
from fewstep.runs.loading import load_run
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run

FIELDS = """
from fewstep.flows.exact import MixtureField, eight_gaussians

def weak():
    field = eight_gaussians()
    return MixtureField(field.means, 3 * field.scales, field.weights)
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "fields.py").write_text(FIELDS)
    return {
        "name": "guided",
        "teacher": {
            "source": "eight-gaussians",
            "guidance": {"scale": 2.0, "weak": f"{tmp_path}/fields.py:weak", "range": [1, 3]},
        },
        "student": {"network": "mlp", "options": {"width": 64, "depth": 2, "guidance": True}},
        "data": "eight-gaussians",
        "objective": {"name": "AYF", "diagonal": 0.75, "times": "gap(-0.8, 1)"},  # as in the paper
        "training": {"steps": 500, "batch": 128, "lr": 3e-3, "quiet": True},
        "evaluation": {"count": 0},
    }


@pytest.mark.takes_seconds
def test_a_student_learns_the_strength_it_is_given(recipe, tmp_path):
    run(load_recipe(recipe), tmp_path / "run")
    student, field = load_run(tmp_path / "run"), eight_gaussians()
    weak = type(field)(field.means, 3 * field.scales, field.weights)
    draw = torch.Generator().manual_seed(0)
    x, _ = field.path.sample(torch.randn(500, 2, generator=draw), field.data(500, draw), 0.6)
    # What three times the guidance adds: the student's and the teacher's point the same way.
    strengths = (torch.full((500,), 1.0), torch.full((500,), 3.0))
    plain, pushed = (student.velocity(x, 0.6, guidance=strength) for strength in strengths)
    true_plain, true_pushed = (Guided(field, 2.0, weak=weak)(x, 0.6, guidance=strength) for strength in strengths)
    added, true = (pushed - plain).flatten(), (true_pushed - true_plain).flatten()
    assert torch.cosine_similarity(added, true, dim=0) > 0.3
    assert 0.1 < float(added @ true / (true @ true)) < 1.2
    # Without a word, no guidance.
    torch.testing.assert_close(student.velocity(x, 0.6), student.velocity(x, 0.6, guidance=torch.ones(500)))


def test_what_cannot_be(recipe):
    with pytest.raises(ValueError, match="guidance needs null conditions, such as"):
        load_recipe({**recipe, "teacher": {"source": "eight-gaussians", "guidance": {"scale": 2.0}}})
    from fewstep.runs.build import build

    recipe["student"]["options"]["guidance"] = False
    with pytest.raises(ValueError, match=r"the student does not take the data .* conditions guidance: .*make it with"):
        build(load_recipe(recipe))


@pytest.mark.takes_seconds
def test_it_is_judged_and_sampled_at_a_strength(recipe, tmp_path, monkeypatch):
    asked = []
    recipe["evaluation"] = {"count": 40, "steps": [1], "teacher_steps": [1], "every": 10**9}
    recipe["training"]["steps"] = 2
    forward = MLP.forward

    def spied(self, *args, guidance=None, **cond):
        asked.append(guidance)
        return forward(self, *args, guidance=guidance, **cond)

    monkeypatch.setattr(MLP, "forward", spied)
    run(load_recipe(recipe), tmp_path / "run")
    judged = [g for g in asked if g is not None and len(g) == 40]
    assert judged
    assert all((g == 2.0).all() for g in judged)
    words = [
        "sample",
        str(tmp_path / "run"),
        "--count",
        "4",
        "--guidance-scale",
        "1.5",
        "--out",
        str(tmp_path / "x.npy"),
    ]
    assert main(words) == 0
    assert torch.equal(asked[-1], torch.full((4,), 1.5))
    with pytest.raises(ValueError, match="takes no strength of guidance: make it with guidance=True"):
        MLP(2, width=8)(torch.zeros(4, 2), torch.zeros(4), guidance=torch.ones(4))


def test_the_strength_is_silent_at_first():
    torch.manual_seed(0)
    network, x, t = MLP(2, width=16, depth=2, guidance=True), torch.randn(8, 2), torch.rand(8)
    assert torch.equal(network(x, t), network(x, t, guidance=torch.full((8,), 3.0)))
    assert network.with_second_time().config["guidance"] is True


def test_points_are_told_the_interval_of_guidance_too():
    torch.manual_seed(0)
    network, x, t = MLP(2, width=16, depth=2).with_second_time("interval"), torch.randn(8, 2), torch.rand(8)
    told = torch.stack([torch.full((8,), 3.0), 0.5 * torch.rand(8), 0.5 + 0.5 * torch.rand(8)], dim=1)
    assert torch.equal(network(x, t, t), network(x, t, t, guidance=told))
    for weight in network.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight)
    all_times = torch.stack([told[:, 0], torch.zeros(8), torch.ones(8)], dim=1)
    assert torch.equal(network(x, t, t, guidance=told[:, 0]), network(x, t, t, guidance=all_times))
    for column in range(3):
        other = told.clone()
        other[:, column] += 0.1
        assert not torch.equal(network(x, t, t, guidance=other), network(x, t, t, guidance=told))
    assert (network.takes_guidance, network.takes_interval) == (True, True)
    with pytest.raises(ValueError, match=r"takes the strength of guidance alone: make it with guidance=.interval."):
        MLP(2, width=8, guidance=True)(x, t, guidance=told)
