"""Average velocities over two steps, one after the other."""

from torch import Tensor

from fewstep.flows.broadcasting import expand
from fewstep.flows.fields import VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.objectives.rows import Rows


def through_middle(model: FlowMap, rows: Rows, part: Tensor | float) -> Tensor:
    """The average velocity from s to t by way of m = s + part (t - s), part (n,) or one for all:
    ``part u(x, s, m) + (1 - part) u(X_{s,m}(x), m, t)``. Two calls."""
    x, s, t = rows.x, rows.s, rows.t
    m = s + part * (t - s)
    first = model.average_velocity(x, s, m, **rows.cond)
    second = model.average_velocity(model.space.move(x, expand(m - s, x) * first), m, t, **rows.cond)
    weight = expand(part, x) if isinstance(part, Tensor) else part
    return weight * first + (1 - weight) * second


def step_velocity(field: VelocityField, x: Tensor, s: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """The mean velocity of one Heun step of a field from s to t: two calls, and no division by t - s."""
    here = field(x, s, **cond)
    return (here + field(field.space.move(x, expand(t - s, x) * here), t, **cond)) / 2


def near_the_end(model: FlowMap, field: VelocityField, rows: Rows, m: Tensor) -> Tensor:
    """The average velocity from s to t by the map to m and one Heun step of a field from there, m (n,)."""
    x, s, t = rows.x, rows.s, rows.t
    first = model.average_velocity(x, s, m, **rows.cond)
    second = step_velocity(field, model.space.move(x, expand(m - s, x) * first), m, t, rows.cond)
    weight = expand((m - s) / (t - s).clamp(min=1e-9), x)  # 0 where s = m = t
    return weight * first + (1 - weight) * second
