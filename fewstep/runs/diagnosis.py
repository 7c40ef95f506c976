"""The geometry of a model: on a few of what it would be sampled for."""

from typing import Any

from fewstep.evaluation.geometry import Geometry, geometry
from fewstep.flows.fields import VelocityField
from fewstep.flows.signature import Model
from fewstep.generation.drawing import one_batch
from fewstep.generation.requests import Requests

POINTS, IMAGES = 64, 8  # trajectories


def trajectories(shape: tuple[int, ...]) -> int:
    """How many are enough to look at."""
    return POINTS if len(shape) == 1 else IMAGES


def geometry_of(
    model: Model, teacher: VelocityField | None, requests: Requests, *, solver: str = "euler", **told: Any
) -> Geometry:
    """The geometry of a model beside its teacher, on the noise, classes and prompts that are asked for.

    Args:
        requests: as ``fewstep.generation.drawing.settled`` gives them.
        told: shape, size, given and guidance, as for ``draw_batches``.

    Raises:
        ValueError: as ``fewstep.geometry``.
    """
    model, noise, cond = one_batch(model, requests, **told)
    return geometry(model, noise, teacher, solver=solver, **cond)


def described(found: Geometry) -> str:
    """What it was measured on, for a caption."""
    what = f"{found.rows} trajectories" if found.rows > 1 else "one trajectory"
    return f"{what}, {found.calls} network calls each"
