"""A ``StableAudioDiTModel`` as the network of a field, and of a flow map."""

from typing import TYPE_CHECKING

from torch import Tensor

from fewstep.networks.families.base import OfSignals, TwoTimeNetwork

if TYPE_CHECKING:
    from diffusers import StableAudioDiTModel


class StableAudio(OfSignals):
    """A ``StableAudioDiTModel`` on latents of sound (B, C, L). Conditions: ``encoder_hidden_states`` (B, tokens, D),
    the last two tokens of which say where the sound begins and ends, and ``global_hidden_states`` (B, 1, D'), which
    says so too.
    """

    code = "stable_audio"
    model: "StableAudioDiTModel"

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        global_hidden_states: Tensor | None = None,
    ) -> Tensor:
        told = {"encoder_hidden_states": encoder_hidden_states, "global_hidden_states": global_hidden_states}
        self.need(**told)
        return self.call(self.model, x, timestep, **told)

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        config = self.model.config
        text = {"encoder_hidden_states": (tokens, config["cross_attention_input_dim"])}
        return {**text, "global_hidden_states": (1, config["global_states_input_dim"])}


class TwoTimeStableAudio(TwoTimeNetwork, StableAudio):
    """Of a ``StableAudioDiTModel``."""
