"""A ``StableAudioDiTModel``: how it is called, and it with a second time."""

from typing import Any

import torch
from diffusers import StableAudioDiTModel
from diffusers.models.embeddings import TimestepEmbedding, get_1d_rotary_pos_embed
from torch import Tensor, nn

from .rows import RowWaves, embedding_like
from .transformer import TwoTimeTransformer


def call(
    model: Any,
    x: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor | None = None,
    global_hidden_states: Tensor | None = None,
) -> Tensor:
    """A ``StableAudioDiTModel`` on the state x (B, C, L), before whose places it puts one for the time."""
    places: Any = torch.arange(x.shape[2] + 1, device=x.device)
    turns = get_1d_rotary_pos_embed(
        model.config["attention_head_dim"] // 2, places, use_real=True, repeat_interleave_real=False
    )
    return model(
        x,
        timestep,
        encoder_hidden_states=encoder_hidden_states,
        global_hidden_states=global_hidden_states,
        rotary_embedding=turns,
        return_dict=False,  # the object that diffusers would return is one it warns of
    )[0]


class TwoTimeStableAudioDiTModel(TwoTimeTransformer, StableAudioDiTModel):
    """A ``StableAudioDiTModel``, whose timesteps are the share of a right angle."""

    call = staticmethod(call)
    noisiest = 1.0

    def take_rows(self, late: bool, guided: int) -> None:
        if late:
            raise ValueError("second_time: late, and a Stable Audio hears its time once, before its first block: say t")
        self.time_proj: Any = RowWaves(self.time_proj)
        self.timestep_proj = RowTimes(self.timestep_proj, guided)


class RowTimes(nn.Sequential):
    """The embedding of the waves of rows of times (B, k, C): (B, D); its weights keep their names."""

    def __init__(self, base: Any, guided: int) -> None:
        super().__init__(*base)
        self.second = TimestepEmbedding(base[0].in_features, base[0].out_features, out_dim=base[2].out_features)
        self.of_guidance = nn.ModuleList(embedding_like(self.second) for _ in range(guided))

    @property
    def new(self) -> list[Any]:
        """What the model did not have before."""
        return [self.second, *self.of_guidance]

    @property
    def like(self) -> dict[str, Tensor]:
        """The weights that what is new starts from."""
        layers: dict[str, Any] = {"linear_1": self[0], "linear_2": self[2]}
        return {f"{name}.{key}": value for name, one in layers.items() for key, value in one.state_dict().items()}

    def forward(self, input: Tensor) -> Tensor:
        # In memory of their own, as matrix products may round otherwise where rows lie apart.
        times = [input] if input.ndim == 2 else [time.contiguous() for time in input.unbind(1)]
        embedded = self[2](self[1](self[0](times[0])))
        for embed, time in zip(self.new if times[1:] else [], times[1:], strict=True):
            embedded = embedded + embed(time)
        return embedded
