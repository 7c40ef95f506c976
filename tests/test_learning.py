"""Short trainings: the objectives bring a small network to the exact flow map of a mixture, on one core in seconds."""

from collections.abc import Callable

import pytest
import torch

from fewstep.data.toy import Toy
from fewstep.evaluation.points import rmse
from fewstep.exact import MixtureField
from fewstep.fields import VelocityField
from fewstep.maps import FlowMap
from fewstep.networks import MLP
from fewstep.objectives import ITVM, LMD, Objective
from fewstep.sampling import sample
from fewstep.training.fit import fit

METHODS: dict[str, Callable[[VelocityField], Objective]] = {
    "ITVM interval": lambda teacher: ITVM(teacher, ema=0.95),
    "ITVM integral": lambda teacher: ITVM(teacher, "integral", ema=0.95),
    "LMD": lambda teacher: LMD(teacher),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_short_training_beats_the_teacher_at_its_own_cost(name: str):
    means = torch.tensor([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.2]])
    field = MixtureField(means, torch.tensor([0.3, 0.25, 0.35]), torch.tensor([0.5, 0.3, 0.2]))
    noise = torch.randn(1000, 2, generator=torch.Generator().manual_seed(9))
    ends = field.flow(noise, 0.0, 1.0, tolerance=1e-6)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = FlowMap(MLP(2, width=64, depth=3, times=2))
    result = fit(student, METHODS[name](field), Toy(field.data), steps=500, batch=256, lr=3e-3, ema=0.99, quiet=True)

    euler = {steps: rmse(sample(field, noise, steps), ends) for steps in (1, 2, 4)}
    learned = {steps: rmse(sample(result.ema, noise, steps), ends) for steps in (1, 2, 4)}
    # One Euler step makes one point of all noise: 1.4, the spread of the data. The map found one step of 0.2 or so.
    assert euler[1] > 1.3
    assert learned[1] < 0.32 < euler[4]
    assert learned[2] < 0.5 * euler[2]
    assert learned[4] < 0.6 * euler[4]
    assert learned[4] < learned[1]
