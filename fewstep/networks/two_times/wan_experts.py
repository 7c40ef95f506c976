"""The two ``WanTransformer3DModel``s of a Wan 2.2 as one model, and with a second time."""

import inspect
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from .transformer import TwoTimeTransformer
from .wan import call, hear_rows

__all__ = ["TwoTimeWanExpertsTransformer3DModel", "WanExpertsTransformer3DModel", "call"]


class WanExpertsTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Two experts of one shape: ``transformer`` answers at timesteps of ``boundary_timestep`` and more, where there is
    much noise, and ``transformer_2`` at those below, as diffusers' pipelines have it.

    With a second time, that of where a step starts chooses: who sees the state answers, however far the step leads.

    Args:
        boundary_timestep: the ``boundary_ratio`` of the pipeline, times its timesteps.
        config: that of each.
    """

    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules = WanTransformer3DModel._keep_in_fp32_modules
    _skip_layerwise_casting_patterns = WanTransformer3DModel._skip_layerwise_casting_patterns
    _no_split_modules = WanTransformer3DModel._no_split_modules
    _repeated_blocks = WanTransformer3DModel._repeated_blocks

    def __init__(self, boundary_timestep: float, **config: Any) -> None:
        super().__init__()
        self.boundary_timestep = boundary_timestep
        self.transformer, self.transformer_2 = WanTransformer3DModel(**config), WanTransformer3DModel(**config)

    # diffusers reads off the signature what belongs into a config.
    _each = inspect.signature(WanTransformer3DModel.__init__)
    _boundary = inspect.Parameter("boundary_timestep", inspect.Parameter.KEYWORD_ONLY)
    __init__.__signature__ = _each.replace(parameters=[*_each.parameters.values(), _boundary])  # pyright: ignore[reportFunctionMemberAccess]
    __init__ = register_to_config(__init__)

    def is_second(self, timestep: Tensor) -> Tensor:
        """Whether ``transformer_2`` answers at timesteps (B,), or rows of them (B, k) that each begin with it."""
        first = timestep if timestep.ndim == 1 else timestep[:, 0]
        return first < self.boundary_timestep

    def forward(self, hidden_states: Tensor, timestep: Tensor, *cond: Any) -> Transformer2DModelOutput:
        """As of a ``WanTransformer3DModel``: each row goes through one expert."""
        is_second = self.is_second(timestep)
        if is_second.is_meta:  # no numbers say which
            return self.transformer(hidden_states, timestep, *cond)
        answers, places = [], []
        for expert, is_its in ((self.transformer, ~is_second), (self.transformer_2, is_second)):
            rows = is_its.nonzero().flatten()
            if len(rows) == len(is_its):
                return expert(hidden_states, timestep, *cond)
            if len(rows):
                some = (value if value is None else value[rows] for value in (hidden_states, timestep, *cond))
                answers, places = [*answers, expert(*some).sample], [*places, rows]
        return Transformer2DModelOutput(sample=torch.cat(answers)[torch.cat(places).argsort()])


class TwoTimeWanExpertsTransformer3DModel(TwoTimeTransformer, WanExpertsTransformer3DModel):
    """Two experts that take rows of times."""

    call = staticmethod(call)

    def take_rows(self, late: bool, guided: int) -> None:
        for expert in (self.transformer, self.transformer_2):
            hear_rows(self, expert, late, guided)
