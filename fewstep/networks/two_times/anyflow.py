"""An ``AnyFlowTransformer3DModel``, a Wan with a second time of its own: how it is called."""

from typing import Any

from torch import Tensor

from ..channels import beside


def call(
    model: Any,
    x: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor | None = None,
    encoder_hidden_states_image: Tensor | None = None,
    image: Tensor | None = None,
    second: Tensor | None = None,
) -> Tensor:
    """An ``AnyFlowTransformer3DModel`` on the state x (B, C, F, H, W), a video, from one timestep to the second, (B,)
    each; it takes those of each frame."""
    frames = beside(model, x, image).transpose(1, 2)
    end = timestep if second is None else second
    times = (time[:, None].expand(frames.shape[:2]) for time in (timestep, end))
    return model(frames, *times, encoder_hidden_states, encoder_hidden_states_image).sample.transpose(1, 2)
