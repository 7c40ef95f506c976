"""Diffusion models of diffusers over their schedulers, in closed form."""

from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from fewstep.flows.fields import DiffusionField

MEAN = torch.tensor([0.8, -0.4], dtype=torch.float64)
COV = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear"},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "trained_betas": {"trained_betas": [0.0005 + 0.02 * (k / 500) ** 2 for k in range(500)]},
}


CASES = [(s, p) for s in SCHEDULES for p in ("epsilon", "v_prediction", "sample")]


SCHEDULES["zero_snr"] = {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}


def make(schedule: str, prediction: str, between: str = "log-ratio") -> tuple[DiffusionField, Tensor]:
    """The converted field, and the times of its schedule's steps: those where the prediction is not held."""
    scheduler = DDPMScheduler(prediction_type=prediction, **SCHEDULES[schedule])
    nodes = node_times(scheduler)
    nodes = nodes[nodes > 1 / 1001] if prediction == "epsilon" else nodes
    return DiffusionField(Oracle(scheduler, between), scheduler), nodes


def node_times(scheduler: Any) -> Tensor:
    """The times of the linear path at which alpha : sigma is that of a step; without a last step that has no signal."""
    power = scheduler.alphas_cumprod.double()
    alpha, sigma = power.sqrt(), (1 - power).sqrt()
    return (alpha / (alpha + sigma))[power > 0]


def ddim(scheduler: Any, model: nn.Module, noise: Tensor, steps: int) -> Tensor:
    scheduler.set_timesteps(steps)
    x = noise
    with torch.no_grad():
        for k in scheduler.timesteps:
            x = scheduler.step(model(x, k).sample, k, x).prev_sample
    return x


class Oracle(nn.Module):
    """``network(x, k)``: the expected noise, data or v at step k of a schedule, for data N(MEAN, COV).

    Between the steps a schedule says nothing, so two readings: ``log-ratio``, log(alpha / sigma) is linear in k, as
    ``Tabulated`` has it; ``beta``, log alpha is linear in k, which is a diffusion whose beta is constant in each step.
    """

    def __init__(self, scheduler: Any, between: str = "log-ratio") -> None:
        super().__init__()
        self.kind, self.between = scheduler.config.prediction_type, between
        power = scheduler.alphas_cumprod.double()
        power = power[power > 0]
        self.table = power.log() - (-power).log1p() if between == "log-ratio" else power.log()
        self.asked: list[Tensor] = []

    def levels(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at step k (B,)."""
        low = k.floor().long().clamp(0, len(self.table) - 2)
        value = torch.lerp(self.table[low], self.table[low + 1], k - low)
        last = len(self.table) - 1  # behind it there may be a step without signal
        value = torch.where(k > last, self.table[-1] + 2 * (last + 1 - k).log(), value)
        if self.between == "log-ratio":
            return torch.sigmoid(value).sqrt(), torch.sigmoid(-value).sqrt()
        return (value / 2).exp(), (-torch.expm1(value)).sqrt()

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        self.asked.append(k)
        alpha, sigma = (level.to(x)[:, None] for level in self.levels(k.double()))
        covariance = alpha[..., None] ** 2 * COV + sigma[..., None] ** 2 * torch.eye(2, dtype=torch.float64)
        residual = torch.linalg.solve(covariance, (x - alpha * MEAN).double())
        noise, data = sigma * residual, MEAN + alpha * residual @ COV
        return {"epsilon": noise, "sample": data, "v_prediction": alpha * noise - sigma * data}[self.kind].to(x)
