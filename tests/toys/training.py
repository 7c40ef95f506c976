"""A student, data and objectives that are small and use everything a training may have to save."""

import json

import torch
from torch import Tensor, nn

from fewstep.common.randomness import normal, uniform
from fewstep.data.batch import Batch
from fewstep.flows.exact import eight_gaussians
from fewstep.flows.maps import FlowMap
from fewstep.networks import MLP
from fewstep.objectives import ITVM, Corrected
from fewstep.objectives.base import Loss, Objective
from fewstep.training.fit import fit


class Student(nn.Module):
    """Two layers with dropout and a buffer that moves."""

    def __init__(self, dim: int = 2, width: int = 16, dropout: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.network = nn.Sequential(
                nn.Linear(dim + 1, width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, dim)
            )
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.network(torch.cat([x, t[:, None].to(x)], 1))


class Gaussian:
    """A density that never ends."""

    shape = (2,)
    size = None

    def rows(self, index: Tensor, generator: torch.Generator) -> Batch:
        return Batch(0.5 * torch.randn(len(index), 2, generator=generator) + 1.0)


class Rows:
    """Numbered rows: what was gathered can be read off the condition."""

    shape = (2,)

    def __init__(self, size: int) -> None:
        self.size = size

    def rows(self, index: Tensor, generator: torch.Generator) -> Batch:
        jitter = uniform(len(index), generator)
        return Batch(torch.stack([index.float().sin(), jitter], 1), {"row": index})


class Matching(Objective):
    """Flow matching with a learned weight, a slow target and a state of its own."""

    def __init__(self, ema: float | None = 0.9, trains: bool = True) -> None:
        super().__init__()
        self.ema = ema
        self.weight = nn.Parameter(torch.zeros(()), requires_grad=trains)
        self.register_buffer("seen", torch.zeros(()))

    def check_student(self, student: nn.Module) -> None:
        """Any student with a velocity."""

    def forward(self, student, batch, *, target=None, progress=0.0, step=0, generator):
        noise, t = normal(batch.data, generator), uniform(len(batch), generator)
        x = noise + t[:, None] * (batch.data - noise)
        velocity = student.velocity(x, t)
        match = (velocity - (batch.data - noise)).square().mean()
        total, terms = match, {"match": match.detach()}
        if target is not None:
            slow = (velocity - target.velocity(x, t)).square().mean()
            total, terms = match + 0.1 * slow, {**terms, "slow": slow.detach()}
        if self.training:
            self.seen += 1
        total = total * torch.exp(-self.weight) + self.weight
        return Loss(total, terms, {"match": torch.stack([t, t], 1)})


class Broken(Matching):
    """Its term is not finite from one step on; or its gradient alone is not."""

    def __init__(self, at: int, what: str = "loss") -> None:
        super().__init__(ema=None)
        self.at, self.what = at, what

    def forward(self, student, batch, *, target=None, progress=0.0, step=0, generator):
        loss = super().forward(student, batch, target=target, progress=progress, step=step, generator=generator)
        if step + 1 < self.at:
            return loss
        if self.what == "loss":
            return Loss(loss.total * float("nan"), {**loss.terms, "match": loss.terms["match"] * torch.nan}, loss.times)
        # Nothing added to the value; the slope of the root at zero is infinite.
        return Loss(loss.total + (0 * next(student.parameters())[0, 0]).sqrt(), loss.terms, loss.times)


def train(out=None, student=None, objective=None, data=None, **options):
    options = {"steps": 12, "batch": 16, "quiet": True, "log_every": 1, **options}
    return fit(student or Student(), objective or Matching(), Gaussian() if data is None else data, out=out, **options)


def weights(result):
    return torch.cat([p.detach().flatten() for p in result.student.parameters()])


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


PLAYERS = {"steps": 8, "batch": 32, "chunk": 8, "seed": 5, "log_every": 1, "quiet": True, "device": "cpu"}


def players(seed: int = 0):
    """Student, objective and data of a training with two players (for ``fit``, with ``PLAYERS``)."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        student = FlowMap(MLP(2, width=16, depth=2, times=2))
    return student, Corrected(ITVM(eight_gaussians()), begin=0.3, every=2, rollout=(1, 2)), Gaussian()
