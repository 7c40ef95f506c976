"""A ``DiTTransformer2DModel`` as the network of a field, and of a flow map."""

from typing import TYPE_CHECKING

from torch import Tensor

from fewstep.networks.families.base import OfDiffusers, TwoTimeNetwork

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel


class DiT(OfDiffusers):
    """A ``DiTTransformer2DModel``: images by class. Conditions: ``class_labels`` (B,), of which the one past the last
    class stands for none; ``image`` (B, C', H, W) where it takes more channels than the state has."""

    code, first = "dit", "pos_embed.proj"
    apart = ("transformer_blocks.0.norm1.emb",)  # the last layer asks the first block what the time is
    model: "DiTTransformer2DModel"

    def __init__(self, model: "DiTTransformer2DModel") -> None:
        super().__init__(model)
        from diffusers.models.embeddings import LabelEmbedding

        # In training mode each block would drop labels by itself, drawn from torch's global generator: what is
        # dropped is for the data to say, once for all blocks.
        for module in model.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0

    def forward(
        self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None, image: Tensor | None = None
    ) -> Tensor:
        self.need(class_labels=class_labels)
        return self.call(self.model, x, timestep, class_labels, image)

    @property
    def classes(self) -> int:
        """How many ``class_labels`` it knows, without the one for none."""
        return self.model.config["num_embeds_ada_norm"]

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        return {"class_labels": ()}


class TwoTimeDiT(TwoTimeNetwork, DiT):
    """Of a ``DiTTransformer2DModel``."""
