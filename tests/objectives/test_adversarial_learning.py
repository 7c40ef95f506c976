"""Short trainings by the adversarial term: noise on the critic's rows, and points that lie astray."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.common.randomness import generator
from fewstep.data.toy import Toy
from fewstep.flows.exact import CheckerboardField
from fewstep.flows.maps import FlowMap
from fewstep.networks import MLP, MLPCritic
from fewstep.objectives import ITVM, Adversarial, Diffused, Loss, Objective
from fewstep.training.fit import fit


class Cluster(nn.Module):
    """A student whose samples are ``by + 0.1 noise``."""

    shape = (2,)

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor([-4.0, 0.0]))

    def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return self.by - 0.9 * x


class Nothing(Objective):
    """A base without a say."""

    def forward(self, student: Any, batch: Any, **_: Any) -> Loss:
        return Loss(0 * student.network.by.sum())


@pytest.mark.takes_seconds
def test_noise_comes_while_the_critic_is_sure_and_goes_as_the_samples_arrive():
    """Two clusters 8 apart, 80 times their width: no real row is near a made one, until they meet."""
    data = torch.tensor([4.0, 0.0]) + 0.1 * torch.randn(20_000, 2, generator=generator(0))
    network, critic = Cluster(), Diffused(MLPCritic((2,), 64, frequencies=0, level=True), sd=0.5, images=3200)
    objective = Adversarial(
        Nothing(), critic, weight=1.0, penalty=0.0, share=1.0, rollout=(1,), begin=0.0, ramp=0.0
    )  # fmt: skip
    noise: list[float] = []
    options: dict[str, Any] = {"lr": 1e-2, "schedule": "constant", "clip": None, "ema": None}
    watch = lambda _: noise.append(float(critic.p))  # noqa: E731
    fit(FlowMap(network), objective, data, 900, batch=64, quiet=True, callbacks=[watch], **options)
    assert max(noise) > 0.9
    assert noise[-1] < 0.3
    assert float((network.by.detach() - torch.tensor([4.0, 0.0])).norm()) < 0.4


@pytest.mark.slow
def test_a_critic_brings_points_back_to_where_data_are():
    """The checkerboard at one call, the same steps for both: the share of samples outside of all squares."""
    field, noise = CheckerboardField(), torch.randn(10_000, 2, generator=generator(1))

    def astray(finish: bool) -> float:
        torch.manual_seed(0)
        student = FlowMap(MLP(2, 128, 4, times=2))
        base: Objective = ITVM(field, ema=0.97, ends=0.02)
        critic = Adversarial(base, weight=0.1, rollout=(1, 2, 4), begin=0.6, lr=3.0) if finish else base
        options: dict[str, Any] = {"batch": 512, "chunk": 512, "lr": 3e-3, "schedule": "constant", "ema": 0.99}
        done = fit(student, critic, Toy(field.data), 1500, warmup=100, quiet=True, **options)
        with torch.no_grad():
            x = done.ema(noise, 0.0, 1.0)[:, None]
        low, high = field.boxes.float().unbind(-1)
        return 1 - float(((x >= low) & (x <= high)).all(-1).any(-1).float().mean())

    plain, finished = astray(False), astray(True)
    print(f"{plain:.3f} of the samples are astray, {finished:.3f} with a critic")
    assert finished < 0.85 * plain
