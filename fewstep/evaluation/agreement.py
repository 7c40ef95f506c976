"""Whether a converted model samples what the original does: its ODE against a sampler of diffusers, from one noise."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.flows.calls import count_calls
from fewstep.flows.fields import DiffusionField, NetworkField
from fewstep.flows.paths import Forward, Linear, Reversed
from fewstep.flows.preconditioned import Cosine, Preconditioned
from fewstep.flows.scheduler_classes import cosine_scheduler_class
from fewstep.flows.schedules import PREDICTION_TYPES
from fewstep.flows.solvers import integrate
from fewstep.flows.tabulated import Tabulated

STEPS = (10, 50, 200)
# On the same steps the two samplers differ by rounding alone, 1e-6 in float32 and more on GPUs that round to TF32;
# a schedule that is off by a few percent differs by more than this.
SAME = 5e-3
# DPM-Solver++ that goes the steps it is told as DDIM does, to clean data.
_FIRST_ORDER: dict[str, Any] = {
    "solver_order": 1, "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero", "thresholding": False,
    **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"), False),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A sampler at a number of steps: network calls a sample, and the RMS difference of its samples from the
    reference, relative to their standard deviation; None for the reference itself."""

    sampler: str
    steps: int
    calls: int
    difference: float | None


@dataclass(frozen=True)
class Agreement:
    """The original sampler and the flow, from the same noise.

    Attributes:
        original: the class of the original's deterministic sampler in diffusers.
        rows: both at several numbers of steps, against the original at its finest.
        same_steps: how many steps the original took where the flow took those very steps, by Euler.
        on_same_steps: the relative difference between those two: rounding, if the conversion is right.
        count, seed: of the samples.
    """

    original: str
    rows: tuple[Row, ...]
    same_steps: int
    on_same_steps: float
    count: int
    seed: int

    @property
    def is_good(self) -> bool:
        """Whether both are one model."""
        return self.on_same_steps <= SAME

    @property
    def verdict(self) -> str:
        """One line."""
        off = f"{self.on_same_steps:.2g}"
        if self.is_good:
            return f"the flow is the model: on the same {self.same_steps} steps both draw the same, to {off}"
        return (
            f"the flow is NOT what {self.original} draws: on the same {self.same_steps} steps they are {off} apart, "
            "where rounding alone is expected; is this the scheduler that the model was trained with?"
        )

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Column names and rows, as ``fewstep.common.console`` prints them."""
        rows = [[row.sampler, row.steps, row.calls, row.difference] for row in self.rows]
        return ["method", "steps", "network calls", "relative difference"], rows


def compare_samplers(
    field: NetworkField, noise: Tensor, steps: Sequence[int], cond: Mapping[str, Any], seed: int = 0
) -> tuple[Agreement, Tensor, Tensor]:
    """How well a field's ODE and the original's own sampler agree, and the samples (B, ...) of both at the middle one
    of the numbers of steps: the original's, and Euler's.

    Args:
        noise: (B, ...), where all start: at the schedule's own first point, before which it knows nothing.
        steps: rising, as :func:`steps_for` gives them.
        cond: conditions, (B, ...) each.
    """
    sampler = sampler_of(field)
    name = "Euler" if type(sampler).__name__ == "FlowScheduler" else type(sampler).__name__
    drawn, calls = {}, {}
    for n in steps:
        with count_calls(field) as counted:
            drawn[n] = original_samples(field, sampler, noise, n, cond)
        calls[n] = counted.count
    reference = drawn[steps[-1]]
    rows = [
        Row(f"original ({name})", n, calls[n], None if n == steps[-1] else _apart(drawn[n], reference)) for n in steps
    ]

    def flow(grid: Tensor, solver: str) -> Tensor:
        with torch.no_grad():
            return integrate(lambda x, t: field(x, t, **cond), start, grid, solver, space=field.space)

    # After the sampler was set to them: these are its steps.
    times, level = _times(sampler, field, steps[0])
    start = noise * level
    same = flow(times.to(noise), "euler")
    euler = {}
    for solver in ("euler", "heun"):
        for n in steps:
            grid = times[0] + (1 - times[0]) * torch.linspace(0, 1, n + 1, dtype=torch.float64)
            with count_calls(field) as counted:
                samples = flow(grid.to(noise), solver)
            euler.setdefault(n, samples)
            rows.append(Row(f"flow, {solver.capitalize()}", n, counted.count, _apart(samples, reference)))
    agreement = Agreement(name, tuple(rows), steps[0], _apart(same, drawn[steps[0]]), len(noise), seed)
    middle = steps[len(steps) // 2]
    return agreement, drawn[middle], euler[middle]


def _apart(samples: Tensor, reference: Tensor) -> float:
    return float((samples - reference).square().mean().sqrt() / reference.std())


@torch.no_grad()
def original_samples(field: NetworkField, sampler: Any, noise: Tensor, steps: int, cond: Mapping[str, Any]) -> Tensor:
    """What the model draws with a sampler of diffusers: its bare network, and nothing of the conversion."""
    _set_steps(sampler, field, steps, noise.device)
    x, asked = noise * sampler.init_noise_sigma, sampler.timesteps
    if isinstance(field.native, Linear) and sampler.config.get(
        "use_flow_sigmas"
    ):  # whose timesteps are its noise levels, cut to whole numbers
        asked = sampler.sigmas[:-1].to(noise) * sampler.config.num_train_timesteps
    for k, told in zip(sampler.timesteps, asked, strict=True):
        prediction = field.network(sampler.scale_model_input(x, k), told.expand(len(x)), **cond)
        x = sampler.step(prediction, k, x).prev_sample
    return x


def scheduler_of(field: NetworkField) -> Any:
    """The diffusers scheduler of a field: its own, or for one put together by hand the one that says the same.

    Raises:
        ValueError: diffusers has none such.
    """
    import diffusers

    if isinstance(field, DiffusionField):
        return field.scheduler
    match field.native, field.prediction:
        case Tabulated(log_ratios=table), ("noise" | "data" | "v") as kind:
            signal = torch.sigmoid(2 * torch.tensor(table, dtype=torch.float64))
            before = torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]])
            betas = (1 - signal / before).tolist()
            prediction: Any = PREDICTION_TYPES[kind]
            betas += [1.0] * field.native.ends_in_noise
            return diffusers.DDPMScheduler(len(betas), trained_betas=betas, prediction_type=prediction)
        case Preconditioned() as edm, ("edm" | "v") as kind:
            return _edm_euler(edm, "epsilon" if kind == "edm" else "v_prediction")
        case Cosine(scale=1.0), "v":
            return cosine_scheduler_class()()
        case Reversed(scale=scale), ("noise" | "data") as kind:
            told: Any = {"prediction_type": PREDICTION_TYPES[kind], "use_flow_sigmas": True}
            return diffusers.DPMSolverMultistepScheduler(round(scale), **told)
        case Reversed(scale=scale), "flow":
            return diffusers.FlowMatchEulerDiscreteScheduler(round(scale))
        case Forward(scale=scale), "velocity":
            return diffusers.FlowMatchEulerDiscreteScheduler(round(scale), invert_sigmas=True)
    raise ValueError(
        f"a network that predicts {field.prediction} on {field.native} has no counterpart among diffusers' schedulers"
    )


def sampler_of(field: NetworkField) -> Any:
    """diffusers' own deterministic sampler of first order for a field's network, of the config of its scheduler, by
    which it reads what the network predicts: DDIM without clipping and with steps that begin at the schedule's last
    one, EDM's Euler (asked at angles on a cosine schedule, whose own samplers draw noise on the way or are of a higher
    order), a flow-match one, or DPM-Solver++: for flow sigmas, and for a schedule that begins where its
    network's prediction says nothing of the data."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EDMEulerScheduler

    from fewstep.networks.flow_model import FlowScheduler

    scheduler = scheduler_of(field)
    config = dict(scheduler.config)
    if isinstance(field.native, Linear) and "prediction_type" in config:
        return DPMSolverMultistepScheduler.from_config(scheduler.config, **_FIRST_ORDER, use_flow_sigmas=True)
    if isinstance(field.native, Linear):
        inverted = isinstance(field.native, Forward)
        return FlowScheduler(
            config.get("num_train_timesteps", 1000), shift=config.get("shift", 1.0), invert_sigmas=inverted
        )
    if isinstance(field.native, Cosine):
        return _cosine_euler(config)
    if isinstance(field.native, Preconditioned):
        if type(scheduler).__name__.startswith("EDM"):
            return EDMEulerScheduler.from_config(scheduler.config, final_sigmas_type="zero")
        return _edm_euler(field.native, "v_prediction")
    if _known_steps(field) < len(scheduler.betas):
        return DPMSolverMultistepScheduler.from_config(
            scheduler.config, **_FIRST_ORDER, prediction_type=config["prediction_type"],
            trained_betas=scheduler.betas.tolist(), rescale_betas_zero_snr=False,
        )  # fmt: skip
    changes: dict[str, Any] = {
        "clip_sample": False,
        "thresholding": False,
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "num_train_timesteps": len(scheduler.betas),
    }
    if config.get("beta_schedule") not in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        # DDIM does not know it: the betas themselves, which are as they came out.
        changes |= {"trained_betas": scheduler.betas.tolist(), "rescale_betas_zero_snr": False}
    if type(scheduler).__name__.startswith("CogVideoX"):  # whose table is shifted, and DDIM's is not
        powers = scheduler.alphas_cumprod.double()
        betas = 1 - powers / torch.cat([powers.new_ones(1), powers[:-1]])
        changes |= {"trained_betas": betas.tolist(), "rescale_betas_zero_snr": False}
    return DDIMScheduler.from_config(scheduler.config, **changes)


def _edm_euler(edm: Preconditioned, prediction_type: Any) -> Any:
    from diffusers import EDMEulerScheduler

    return EDMEulerScheduler(edm.sigma_min, edm.sigma_max, edm.sigma_data, prediction_type=prediction_type)


def _cosine_euler(config: Mapping[str, Any]) -> Any:
    from diffusers import EDMEulerScheduler

    class CosineEuler(EDMEulerScheduler):
        """EDM's Euler, whose network is asked at the angle between data and noise, a right one of which is 1."""

        def precondition_noise(self, sigma: Any) -> Tensor:
            return torch.as_tensor(sigma).atan() / math.pi * 2

    ends = config.get("sigma_min", 0.3), config.get("sigma_max", 500.0)
    return CosineEuler(*ends, sigma_data=1.0, sigma_schedule="exponential", prediction_type="v_prediction")


def steps_for(field: NetworkField, steps: Sequence[int] | None) -> tuple[int, ...]:
    """The numbers of steps to compare at, rising; by default some 10, 50 and 200.

    Raises:
        ValueError: none, some below 1, or some that do not divide the steps of a diffusion schedule: there diffusers'
            DDIM jumps elsewhere than it goes on from.
    """
    asked = STEPS if steps is None else tuple(sorted(set(steps)))
    if not asked or asked[0] < 1:
        raise ValueError(f"steps {list(steps or ())}: one number of steps or more is needed, each at least 1")
    if isinstance(field.native, Linear | Preconditioned | Cosine):
        if asked[0] < 2 and isinstance(field.native, Preconditioned):
            raise ValueError("steps 1: EDM's sampler needs 2 at least, from its most noise to its least")
        return asked
    total = len(scheduler_of(field).betas)
    if (known := _known_steps(field)) < total:
        if asked[-1] > known:
            raise ValueError(f"steps {asked[-1]}: at {known} steps of this schedule its prediction means something")
        return asked
    divisors = [n for n in range(1, total + 1) if total % n == 0]
    nearest = tuple(min(divisors, key=lambda d, n=n: abs(math.log(d / n))) for n in asked)
    if steps is not None and nearest != asked:
        raise ValueError(
            f"steps {' '.join(map(str, asked))}: diffusers' DDIM is right where the steps divide the schedule's "
            f"{total}, which {' '.join(map(str, nearest))} do"
        )
    return tuple(sorted(set(nearest)))


def _known_steps(field: NetworkField) -> int:
    """At how many steps of its table, from the cleanest on, a network's prediction says what the data are."""
    low, _ = field.native.hold_range(field.prediction)
    return math.floor(float(field.native.network_time(torch.tensor(low, dtype=torch.float64))) + 1e-6) + 1


def _set_steps(sampler: Any, field: NetworkField, steps: int, device: Any = None) -> None:
    if isinstance(field.native, Tabulated) and type(sampler).__name__ == "DPMSolverMultistepScheduler":
        known = _known_steps(field)
        chosen = [round(known * (steps - i) / steps) - 1 for i in range(steps)]
        sampler.set_timesteps(timesteps=chosen, device=device)
    else:
        sampler.set_timesteps(steps, device=device)


def _times(sampler: Any, field: NetworkField, steps: int) -> tuple[Tensor, Tensor]:
    """The times of the linear path (float64, rising to 1) at which a sampler of diffusers stands in so many steps, and
    what its standard normal noise is to be multiplied by there."""
    native = field.native
    _set_steps(sampler, field, steps)
    if isinstance(native, Linear):
        sigmas = sampler.sigmas.double()
        return (sigmas if isinstance(native, Forward) else 1 - sigmas), torch.tensor(1.0)
    if isinstance(native, Preconditioned | Cosine):
        sigmas = sampler.sigmas.double()  # of data + sigma noise
        return 1 / (1 + sigmas), sampler.init_noise_sigma / (1 + sigmas[0])
    signal = sampler.alphas_cumprod.double()[sampler.timesteps]
    alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
    times = torch.cat([alpha / (alpha + sigma), torch.ones(1, dtype=torch.float64)])
    return times, 1 / (alpha[0] + sigma[0])
