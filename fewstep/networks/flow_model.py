"""Diffusion models that answer as flow-match models do, with the weights that they have.

The network goes on predicting what it was trained to predict, at its own steps. These classes translate: they take the
timestep of a flow-match scheduler, ask the network at the step of its own schedule that has the same ratio of data to
noise, and return the flow, noise - data (arXiv 2506.02221). A converted model carries this file beside its weights, so
it needs torch and diffusers alone::

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("this/folder", trust_remote_code=True)
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    PixArtTransformer2DModel,
    StableAudioDiTModel,
    UNet1DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from .held import held_ratios


def flow_scaling(sigma: Tensor, diffusion: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How the network's output F becomes a flow at noise levels sigma (B,), float64: (c, k, p, q), (B,) each, in
    ``flow = p x + q F(c x, k)`` for ``x = (1 - sigma) data + sigma noise``.

    It is ``fewstep.flows.change_of_path.scaling`` for the cases needed here, written again because this file is carried
    alone; a test of fewstep's holds the two equal. Beyond an end of its schedule the network is asked at its last step,
    and of its two estimates the one that means something there is kept: the data towards noise, the noise towards data.

    Args:
        diffusion: see :class:`FromDiffusion`.
    """
    a, s = 1 - sigma, sigma
    ratio = a.log() - s.log()
    least, most = held_ratios(diffusion)
    low, high = ratio <= least, ratio >= most
    held = ratio.clamp(least, most)
    step, deviation = _step(held, diffusion), diffusion.get("sigma_data", 1.0)
    # The network was trained on ``(alpha / deviation) data + beta noise`` with alpha^2 + beta^2 = 1, up to a scale.
    odds = 2 * (held + torch.full_like(held, deviation).log())
    alpha, beta = torch.sigmoid(odds).sqrt(), torch.sigmoid(-odds).sqrt()
    if "timesteps" in diffusion:  # on the straight path: that scale is its own
        power = alpha + beta
        alpha, beta = alpha / power, beta / power
    into = torch.hypot(alpha / deviation, beta) / torch.hypot(a, s)

    # data = data_x x + data_f F and noise = noise_x x + noise_f F, for the network's prediction F
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    match diffusion["prediction_type"]:
        case "sample":
            data_x, data_f, noise_x, noise_f = zero, one, into / beta, -alpha / beta
        case "epsilon" if "sigma_data" not in diffusion:
            data_x, data_f, noise_x, noise_f = into / alpha, -beta / alpha, zero, one
        case kind:
            v = 1 if kind == "v_prediction" else -1  # what EDM calls epsilon is -v
            data_x, data_f = deviation * alpha * into, -v * deviation * beta
            noise_x, noise_f = beta * into, v * alpha
    noise_x, noise_f = torch.where(low, (1 - a * data_x) / s, noise_x), torch.where(low, -a * data_f / s, noise_f)
    data_x, data_f = torch.where(high, (1 - s * noise_x) / a, data_x), torch.where(high, -s * noise_f / a, data_f)
    return into, step, noise_x - data_x, noise_f - data_f


def _step(ratio: Tensor, diffusion: dict[str, Any]) -> Tensor:
    """The network's own time where log(data / noise) is this, (B,)."""
    if "sigma_data" in diffusion:
        return -ratio / 4
    if "right_angle" in diffusion:
        return diffusion["right_angle"] * (-ratio).exp().atan() * 2 / math.pi
    if "timesteps" in diffusion:
        return torch.sigmoid(-ratio) * diffusion["timesteps"]
    table = torch.tensor(diffusion["log_ratios"], dtype=ratio.dtype, device=ratio.device).flip(0)  # rising
    inside = ratio.clamp(min=float(table[0]))
    before = (torch.searchsorted(table, inside, right=True) - 1).clamp(0, len(table) - 2)
    part = (inside - table[before]) / (table[before + 1] - table[before])
    # Between the last step with a signal and that of noise alone the ratio itself is linear.
    return torch.where(ratio < table[0], len(table) - (ratio - table[0]).exp(), len(table) - 1 - (before + part))


class FromDiffusion:
    """What makes a diffusers model a flow-match one; it comes before the model's class.

    ``forward`` takes timesteps ``sigma * flow_timesteps`` of ``x = (1 - sigma) data + sigma noise``, one for all
    or one a sample, and returns the flow. The config has two entries more than the model's own:

    Attributes:
        diffusion: what the network was trained as: ``prediction_type`` (epsilon, sample, v_prediction), and
            ``log_ratios``, log(alpha / sigma) of every step of a variance-preserving schedule, falling, and
            ``ends_in_noise`` where one more, of noise alone, stands behind them; or EDM's ``sigma_data``, ``sigma_min``
            and ``sigma_max`` (arXiv 2206.00364); or ``right_angle``, the timestep of pure noise on the cosine schedule,
            of which the timestep is the angle between data and noise; or ``timesteps``, that of pure noise on the
            straight path.
        flow_timesteps: the timestep of pure noise, as the flow-match scheduler has it.
    """

    # The pipelines of transformers split a variance off themselves; those of U-Nets leave it to the scheduler, and a
    # flow-match one knows none.
    keeps_variance = False

    def _flow(self: Any, network: Callable[..., Any], x: Tensor, timestep: Any, return_dict: bool) -> Any:
        # The arithmetic in float64 (not on Apple's GPUs, which have none), as near its ends it takes differences.
        exact = torch.float64 if x.device.type != "mps" else torch.float32
        sigma = torch.as_tensor(timestep, device=x.device).to(exact) / self.config.flow_timesteps
        # Behind the state an image may stand, of which the network makes nothing.
        channels = self.config.get("_state_channels") or min(x.shape[1], self.config.out_channels or x.shape[1])
        is_last = bool(self.config.get("_image_first"))  # the state, behind the image
        x, beside = (x[:, -channels:], x[:, :-channels]) if is_last else (x[:, :channels], x[:, channels:])
        into, step, skip, out = flow_scaling(sigma.expand(len(x)), self.config.diffusion)
        working = torch.promote_types(x.dtype, torch.float32)
        into, skip, out = (c.to(working).reshape(-1, *[1] * (x.ndim - 1)) for c in (into, skip, out))

        parts = [(into * x).to(x.dtype), beside]
        output = network(torch.cat(parts[::-1] if is_last else parts, dim=1), step.to(working))
        # A network that also predicts a variance does so in a second half of its channels.
        prediction, variance = output.sample[:, :channels], output.sample[:, channels:]
        flow = (skip * x + out * prediction).to(prediction.dtype)
        if variance.shape[1] and self.keeps_variance:
            flow = torch.cat([flow, variance], dim=1)
        return type(output)(sample=flow) if return_dict else (flow,)


def _with_diffusion(init: Callable[..., None]) -> Any:
    """The ``__init__`` of a model with two options more. Its signature has them all, as diffusers reads from it what
    belongs into the config."""

    def made(self: Any, *args: Any, diffusion: dict[str, Any], flow_timesteps: int = 1000, **config: Any) -> None:
        init(self, *args, **config)
        self.register_to_config(diffusion=diffusion, flow_timesteps=flow_timesteps)

    own = [p for p in inspect.signature(made).parameters.values() if p.kind is p.KEYWORD_ONLY]
    signature = inspect.signature(init)
    made.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *own])
    return made


class FlowUNet1DModel(FromDiffusion, UNet1DModel):
    """A diffusion ``UNet1DModel`` as a flow-match model."""

    __init__ = _with_diffusion(UNet1DModel.__init__)

    def forward(self, sample: Tensor, timestep: Any, return_dict: bool = True) -> Any:
        def network(x: Tensor, step: Tensor) -> Any:
            return UNet1DModel.forward(self, x, step)

        return self._flow(network, sample, timestep, return_dict)


class FlowUNet2DModel(FromDiffusion, UNet2DModel):
    """A diffusion ``UNet2DModel`` as a flow-match model."""

    __init__ = _with_diffusion(UNet2DModel.__init__)

    def forward(self, sample: Tensor, timestep: Any, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        def network(x: Tensor, step: Tensor) -> Any:
            return UNet2DModel.forward(self, x, step, *args, **kwargs)

        return self._flow(network, sample, timestep, return_dict)


class FlowUNet2DConditionModel(FromDiffusion, UNet2DConditionModel):
    """A diffusion ``UNet2DConditionModel`` as a flow-match model."""

    __init__ = _with_diffusion(UNet2DConditionModel.__init__)

    def forward(self, sample: Tensor, timestep: Any, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        def network(x: Tensor, step: Tensor) -> Any:
            return UNet2DConditionModel.forward(self, x, step, *args, **kwargs)

        return self._flow(network, sample, timestep, return_dict)


class FlowDiTTransformer2DModel(FromDiffusion, DiTTransformer2DModel):
    """A diffusion ``DiTTransformer2DModel`` as a flow-match model."""

    __init__ = _with_diffusion(DiTTransformer2DModel.__init__)
    keeps_variance = True

    def forward(
        self, hidden_states: Tensor, timestep: Any = None, *args: Any, return_dict: bool = True, **kwargs: Any
    ) -> Any:
        def network(x: Tensor, step: Any) -> Any:
            return DiTTransformer2DModel.forward(self, x, step, *args, **kwargs)

        return self._flow(network, hidden_states, timestep, return_dict)


class FlowPixArtTransformer2DModel(FromDiffusion, PixArtTransformer2DModel):
    """A diffusion ``PixArtTransformer2DModel`` as a flow-match model."""

    __init__ = _with_diffusion(PixArtTransformer2DModel.__init__)
    keeps_variance = True

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Any = None,
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        def network(x: Tensor, step: Any) -> Any:
            return PixArtTransformer2DModel.forward(self, x, encoder_hidden_states, step, *args, **kwargs)

        return self._flow(network, hidden_states, timestep, return_dict)


class FlowCogVideoXTransformer3DModel(FromDiffusion, CogVideoXTransformer3DModel):
    """A diffusion ``CogVideoXTransformer3DModel`` as a flow-match model; its frames stand before the channels."""

    __init__ = _with_diffusion(CogVideoXTransformer3DModel.__init__)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Any,
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        def network(x: Tensor, step: Any) -> Any:
            video = x.transpose(1, 2)
            given = CogVideoXTransformer3DModel.forward(self, video, encoder_hidden_states, step, *args, **kwargs)
            return Transformer2DModelOutput(sample=given[0].transpose(1, 2))

        flow = self._flow(network, hidden_states.transpose(1, 2), timestep, True).sample.transpose(1, 2)
        return Transformer2DModelOutput(sample=flow) if return_dict else (flow,)


class FlowStableAudioDiTModel(FromDiffusion, StableAudioDiTModel):
    """A diffusion ``StableAudioDiTModel`` as a flow-match model."""

    __init__ = _with_diffusion(StableAudioDiTModel.__init__)

    def forward(
        self, hidden_states: Tensor, timestep: Any = None, *args: Any, return_dict: bool = True, **kwargs: Any
    ) -> Any:
        def network(x: Any, step: Any) -> Any:
            # The object that diffusers would return is one it warns of.
            given = StableAudioDiTModel.forward(self, x, step, *args, return_dict=False, **kwargs)
            return Transformer2DModelOutput(sample=given[0])

        return self._flow(network, hidden_states, timestep, return_dict)


class FlowScheduler(FlowMatchEulerDiscreteScheduler):
    """``FlowMatchEulerDiscreteScheduler`` with what the pipelines of diffusion models ask a scheduler for: noise of
    deviation 1 to begin with, and the state as it is for the network."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample
