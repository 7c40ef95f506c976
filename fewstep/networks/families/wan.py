"""A ``WanTransformer3DModel`` as the network of a field, and of a flow map."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fewstep.networks.families.base import Sized, TwoTimeNetwork

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel


class Wan(Sized):
    """A ``WanTransformer3DModel``: videos (B, C, F, H, W). Conditions: ``encoder_hidden_states`` (B, tokens, D), and
    ``encoder_hidden_states_image`` (B, tokens, D') where the model was trained with an image, ``image``
    (B, C', F, H, W) where it takes more channels than the state has.
    """

    code, first = "wan", "patch_embedding"
    usual = (21, 60, 104)
    names_sigmas = False
    model: "WanTransformer3DModel"

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_image: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        text = {"encoder_hidden_states": encoder_hidden_states}
        text["encoder_hidden_states_image"] = encoder_hidden_states_image
        self.need(**text)
        return self.call(self.model, x, timestep, **text, image=image)

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        config = self.model.config
        image = {} if config["image_dim"] is None else {"encoder_hidden_states_image": (257, config["image_dim"])}
        return {"encoder_hidden_states": (tokens, config["text_dim"]), **image}


class TwoTimeWan(TwoTimeNetwork, Wan):
    """Of a ``WanTransformer3DModel``."""


class WanExperts(Wan):
    """The two ``WanTransformer3DModel``s of a Wan 2.2: one answers where there is much noise, one where there is little
    (``fewstep.networks.two_times.wan_experts``). Conditions as those of one."""

    code, first = "wan_experts", ""
    needs_whole = "which expert is called depends on a process's own rows: train one expert, or leave shard out"
    model: Any

    def is_second(self, timestep: Tensor) -> Tensor:
        """Whether the expert of little noise answers at timesteps (B,)."""
        return self.model.is_second(timestep)


class TwoTimeWanExperts(TwoTimeNetwork, WanExperts):
    """Of both: the expert that sees the state answers, wherever the step ends."""
