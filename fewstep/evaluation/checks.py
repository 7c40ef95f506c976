"""What an evaluation refuses before it computes, and what its data are known to be."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fewstep.data.batch import Data
from fewstep.flows.exact import ExactField
from fewstep.flows.fields import VelocityField
from fewstep.flows.maps import FlowMap


def check_arguments(
    model: Any, teacher: Any, data: Data, extractor: nn.Module | None, steps: Sequence[int], count: int, batch: int
) -> None:
    """That the arguments of ``evaluate`` can be.

    Raises:
        ValueError: they cannot.
    """
    if not isinstance(model, FlowMap | VelocityField):
        raise ValueError(f"evaluate takes a FlowMap or a VelocityField, not a {type(model).__name__}")
    if teacher is not None and not isinstance(teacher, VelocityField):
        raise ValueError(f"the teacher is a VelocityField, not a {type(teacher).__name__}")
    if not steps or min(steps) < 1:
        raise ValueError(f"steps are {list(steps)}: one or more are needed, each at least 1")
    if batch < 1:
        raise ValueError(f"batch is {batch}: at least one sample is drawn at once")
    if min(count, data.size or count) < 4:
        raise ValueError(f"{count} samples against {data.size or count} rows of data: at least 4 of each are needed")
    if extractor is not None and len(data.shape) != 3:
        raise ValueError(f"an extractor judges images (C, H, W), and a sample has shape {tuple(data.shape)}")


def check_training(trained: Data | None, data: Data) -> None:
    """That the rows trained on can be near to samples.

    Raises:
        ValueError: they are without end, fewer than two, or of another shape than the data.
    """
    if trained is None:
        return
    if tuple(trained.shape) != tuple(data.shape):
        raise ValueError(
            f"training {tuple(trained.shape)} and data {tuple(data.shape)} differ in the shape of a sample"
        )
    if trained.size is None or trained.size < 2:
        raise ValueError(f"training has {trained.size or 'no'} rows to be near to: 2 are needed, leave it out")


def support_of(data: Any, teacher: VelocityField | None) -> Callable[[Tensor], Tensor] | None:
    """Which points (N, D) can be data, (N,), as the data know it, or an exact teacher; None where neither does."""
    return getattr(data, "inside", None) or (
        getattr(teacher, "inside", None) if isinstance(teacher, ExactField) else None
    )
