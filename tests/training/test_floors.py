"""A player that has won is told of once, and what to change with it."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from fewstep.flows.maps import FlowMap
from fewstep.networks import MLP
from fewstep.objectives import Loss, Objective, Player
from fewstep.training.fit import fit
from fewstep.training.floors import Floors


def seen(losses: dict[int, float], step: int = 0, name: str = "critic") -> list[str]:
    """The warnings of these means of the loss, by step."""
    floors = Floors({"student": Player([]), "critic": Player([], floor=0.05, advice="Change it")}, step)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for at, loss in losses.items():
            floors.see(at, {"loss": 0.0, f"loss/{name}": loss})
    return [str(warning.message) for warning in caught]


def test_two_hundred_steps_below_its_floor_and_one_line_is_said():
    assert seen({50 * k: 0.01 for k in range(1, 4)}) == []
    said = seen({50 * k: 0.01 for k in range(1, 20)})
    assert said == [
        "step 200: for 200 steps the loss of 'critic' is below 0.05: it has won, and the student learns nothing from "
        "it any more. Change it"
    ]
    assert seen({150: 0.01, 200: 0.05, 350: 0.01}) == []  # a mean above it begins anew
    assert len(seen({150: 0.01, 200: 0.05, 350: 0.01, 400: 0.01})) == 1
    assert seen({10_150: 0.01}, step=10_000) == []  # gone on from there
    assert seen({50 * k: 0.01 for k in range(1, 20)}, name="student") == []  # it has no floor


def test_a_player_that_has_no_loss_yet_has_not_won():
    assert seen({50 * k: 0.01 for k in range(1, 20)}, name="other") == []


class Won(Objective):
    """A player whose loss is 0 from the start."""

    def __init__(self, floor: float | None) -> None:
        super().__init__()
        self.other, self.floor = nn.Linear(1, 1), floor

    def parameter_groups(self, student: nn.Module) -> dict[str, Any]:
        return {"student": list(student.parameters()), "other": Player(list(self.other.parameters()), floor=self.floor)}

    def forward(self, student: Any, batch: Any, **_: Any) -> Loss:
        own = sum(p.square().sum() for p in student.parameters())
        return Loss(torch.as_tensor(own), others={"other": 0 * self.other.weight.sum()})


def test_a_training_says_it_while_it_goes_on():
    with pytest.warns(UserWarning, match="step 200: for 200 steps the loss of 'other' is below 0.1"):
        fit(FlowMap(MLP(2, 4, 1, times=2)), Won(0.1), torch.zeros(64, 2), 250, batch=2, quiet=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(FlowMap(MLP(2, 4, 1, times=2)), Won(None), torch.zeros(64, 2), 250, batch=2, quiet=True)
