"""How far a flow map is from its teacher's: what a flow map obeys, as residuals over pairs of times (s, t).

With v the teacher's velocity, X the map and u its average velocity (arXiv 2406.07507, section 3):

* tangent: ``u(x, s, s) - v_s(x)``
* Lagrangian: ``d_t X_{s,t}(x) - v_t(X_{s,t}(x))``
* Eulerian: ``d_s X_{s,t}(x) + (grad X_{s,t}(x)) v_s(x)``
* composition: ``X_{m,t}(X_{s,m}(x)) - X_{s,t}(x)``, m in the middle
* inverse: ``X_{t,s}(X_{s,t}(x)) - x``; large for a map that was trained from noise to data alone

The first three are velocities, the last two positions. A training loss says less: it mixes all times, and shows the
one identity that it asks for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from fewstep.evaluation.points import rmse
from fewstep.flows.fields import VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import sample
from fewstep.flows.trajectories import teacher_states
from fewstep.objectives.derivative import forward_mode

VELOCITIES = ("tangent", "lagrangian", "eulerian")
POSITIONS = ("composition", "inverse")


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Residuals of a flow map: roots of mean squared vector norms, over the rows of a batch.

    ``residuals[name][i, j]`` belongs to s = ``times[i]``, t = ``times[j]``; NaN where t < s, and for the tangent off
    the diagonal. ``speed`` is the same norm of v, ``spread`` that of the states around their mean: units for both
    kinds.
    """

    times: Tensor  # (T,)
    residuals: dict[str, Tensor]  # each (T, T)
    speed: float
    spread: float

    def relative(self, name: str) -> Tensor:
        """A residual over the speed (velocities) or over the spread (positions), (T, T): 1 is no knowledge at all."""
        return self.residuals[name] / (self.speed if name in VELOCITIES else self.spread)

    def summary(self) -> dict[str, float]:
        """Each relative residual as one number, the root of its mean square over the grid; and the two units."""
        rms = {name: float(self.relative(name).square().nanmean().sqrt()) for name in self.residuals}
        return {**rms, "speed": self.speed, "spread": self.spread}


@torch.no_grad()
def diagnose(
    flow_map: FlowMap,
    field: VelocityField,
    noise: Tensor,
    data: Tensor | None = None,
    *,
    times: Sequence[float] | Tensor | int = 9,
    **cond: Any,
) -> Diagnosis:
    """The residuals of a flow map against its teacher, for every s <= t of a grid.

    Costs 6 network calls of B rows for each of the T (T + 1) / 2 pairs, two of them with a JVP, which holds the
    activations of two calls: some 64 images or 1000 points are enough.

    Args:
        noise: states at t = 0, (B, ...), in the precision wanted (float64 shows residuals down to 1e-15).
        data: rows paired with the noise, (B, ...). With them the states are those of training, drawn from the path;
            without, those the teacher's own flow reaches from the noise, which few-step samples should pass through.
        times: the grid in [0, 1], rising, or how many evenly spaced times.
        cond: conditions, (B, ...) each, for both models.

    Raises:
        ValueError: times that do not rise within [0, 1].
    """
    grid = torch.linspace(0, 1, times) if isinstance(times, int) else torch.as_tensor(times)
    grid = grid.to(noise.device, torch.promote_types(noise.dtype, torch.float32))
    if grid.ndim != 1 or len(grid) < 2 or not bool((grid.diff() > 0).all()) or grid[0] < 0 or grid[-1] > 1:
        raise ValueError(f"the times of a diagnosis rise within [0, 1], these are {grid.tolist()}")
    if data is None:
        states = list(teacher_states(field, noise, grid, **cond))
    else:
        states = [field.path.sample(noise, data, t.expand(len(noise)))[0] for t in grid]

    residuals = {name: grid.new_full((len(grid), len(grid)), math.nan) for name in VELOCITIES + POSITIONS}
    speeds = grid.new_zeros(len(grid))
    with forward_mode():
        for i, x in enumerate(states):
            s = grid[i].repeat(len(x))
            v = field(x, s, **cond)
            speeds[i] = _rms(v)
            residuals["tangent"][i, i] = _rms(flow_map.velocity(x, s, **cond) - v)
            for j in range(i, len(grid)):
                for name, value in _residuals(flow_map, field, x, v, s, grid[j].repeat(len(x)), cond).items():
                    residuals[name][i, j] = _rms(value)
    spread = torch.stack([_rms(x - x.mean(dim=0)) for x in states]).square().mean().sqrt()
    speed = speeds.square().mean().sqrt()
    return Diagnosis(grid.cpu(), {k: r.cpu() for k, r in residuals.items()}, float(speed), float(spread))


def _residuals(
    flow_map: FlowMap, field: VelocityField, x: Tensor, v: Tensor, s: Tensor, t: Tensor, cond: dict[str, Any]
) -> dict[str, Tensor]:
    def along(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return flow_map(x, s, t, **cond)

    one, zero = torch.ones_like(s), torch.zeros_like(s)
    end, moves, *_ = jvp(along, (x, s, t), (torch.zeros_like(x), zero, one))
    _, drifts, *_ = jvp(along, (x, s, t), (v, one, zero))
    middle = (s + t) / 2
    return {
        "lagrangian": moves - field(end, t, **cond),
        "eulerian": drifts,
        "composition": along(along(x, s, middle), middle, t) - end,
        "inverse": along(end, t, s) - x,
    }


@torch.no_grad()
def endpoint_rmse(
    model: FlowMap | VelocityField,
    reference: VelocityField | Tensor,
    noise: Tensor,
    steps: int = 1,
    *,
    solver: str = "euler",
    batch_size: int = 1024,
    **cond: Any,
) -> float:
    """How far few-step samples end from where the teacher's ODE ends, row by row (``points.rmse``).

    Args:
        model: the student, or the teacher itself, taken in ``steps`` steps.
        reference: the teacher, or its end points (B, ...) for this noise, as ``teacher_states(...)[-1]`` gives them:
            the thing to pass where several models or step counts are measured.
        noise: (B, ...); ``batch_size`` rows at a time are sampled.
        solver: how a velocity field is solved; see ``sample``.
    """
    squares = 0.0
    for start in range(0, len(noise), batch_size):
        part = slice(start, start + batch_size)
        some = {name: value[part] for name, value in cond.items()}
        if isinstance(reference, Tensor):
            ends = reference[part]
        else:
            ends = teacher_states(reference, noise[part], torch.ones(1), **some)[-1]
        samples = sample(model, noise[part], steps, solver=solver, **some)
        squares += rmse(samples, ends) ** 2 * len(samples)
    return math.sqrt(squares / len(noise))


def _rms(vectors: Tensor) -> Tensor:
    return vectors.flatten(1).square().sum(dim=1).mean().sqrt()
