"""diffusers' ``UNet2DModel`` as a field's network, and what U-Nets have in common.

It is called with timesteps in the units the model was trained with, which the field's native path supplies.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fewstep.common.errors import shown
from fewstep.networks.calls import call_unet, state_channels

if TYPE_CHECKING:
    from diffusers import UNet2DModel


class OfDiffusers(nn.Module):
    """A network that calls a ``model`` of diffusers, and knows from its config what its samples are."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def channels(self) -> int:
        """Those of the state."""
        return state_channels(self.model.config)

    @property
    def has_size(self) -> bool:
        """Whether it says how large its samples are."""
        return self.model.config.get("sample_size", 0) is not None

    @property
    def image_channels(self) -> int:
        """Those of an image that goes in beside the state, as the condition ``image``; 0 for none."""
        return self.model.config["in_channels"] - self.channels

    @property
    def shape(self) -> tuple[int, ...]:
        """That of one sample, (C, H, W).

        Raises:
            ValueError: its config has no size, or what is none.
        """
        size = self.model.config["sample_size"]
        if size is None:
            raise ValueError(
                f"the config of this {type(self.model).__name__} has no sample_size: say it (`fewstep sample --size "
                f"64`, --data.size 64 for pictures, --data.shape '[{self.channels}, 64, 64]' for samples of the "
                "teacher), or write it into its config.json"
            )
        sides = [size, size] if isinstance(size, int) else size
        if not isinstance(sides, list | tuple) or [type(side) for side in sides] != [int, int] or min(sides) < 1:
            raise ValueError(
                f"the config of this {type(self.model).__name__} has the sample_size {shown(size)}, and one side or "
                "two, height and width, are needed"
            )
        return self.channels, *sides

    @property
    def classes(self) -> int:
        """How many ``class_labels`` it knows, 0 for none."""
        config = self.model.config
        return 0 if config.get("class_embed_type") is not None else config.get("num_class_embeds") or 0

    @property
    def takes_guidance(self) -> bool:
        """Whether it is told the strength of guidance, the condition ``guidance`` (B,)."""
        return False

    def told(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """The conditions without which it cannot be called, and the shape of one sample's row of each.

        Args:
            tokens: how long a prompt is, for a model of text.
        """
        raise NotImplementedError

    def blank(
        self, shape: tuple[int, ...], rows: int, tokens: int, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """Zeros for all that it is told beside states of ``shape``, (rows, ...) each."""
        shapes = self.told(tokens)
        if self.image_channels:
            shapes["image"] = (self.image_channels, *shape[1:])
        kinds = {"class_labels": torch.long} if self.classes else {}
        return {name: torch.zeros(rows, *shape, dtype=kinds.get(name), device=device) for name, shape in shapes.items()}

    @property
    def needed(self) -> list[str]:
        """The names of the conditions without which it cannot be called."""
        return list(self.told(1))

    def need(self, **cond: Tensor | None) -> None:
        """That the conditions which it needs are given.

        Raises:
            ValueError: one is not.
        """
        missing = next((name for name in self.needed if cond.get(name) is None), None)
        if missing is not None:
            is_text = missing not in ("class_labels", "guidance")
            way = "; field.text.encode(prompts) makes the conditions of prompts" if is_text else ""
            raise ValueError(
                f"this {type(self.model).__name__} needs the condition {missing}, one row a sample, and this call does "
                f"not have it: pass it{way}"
            )


class UNet(OfDiffusers):
    """``net(x, timestep, class_labels=None)`` over a diffusers ``UNet2DModel``; images (B, C, H, W)."""

    model: "UNet2DModel"

    def forward(
        self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None, image: Tensor | None = None
    ) -> Tensor:
        self.need(class_labels=class_labels)
        return call_unet(self.model, x, timestep, class_labels, image)

    def told(self, tokens: int) -> dict[str, tuple[int, ...]]:
        return label_shape(self.model)


def label_shape(model: Any) -> dict[str, tuple[int, ...]]:
    """The row of ``class_labels`` of a U-Net that needs them: the number of a class, a time, or a vector."""
    config = model.config
    match config["class_embed_type"]:
        case None:
            return {} if config["num_class_embeds"] is None else {"class_labels": ()}
        case "projection" | "simple_projection":
            return {"class_labels": (config["projection_class_embeddings_input_dim"],)}
        case "identity":
            return {"class_labels": (model.time_embedding.linear_2.out_features,)}
        case _:
            return {"class_labels": ()}


def keep_facts(model: Any, source: Any) -> None:
    """Have the config of a model say what that of ``source`` does of its channels (see ``calls.state_channels``)."""
    facts = {name: source.config[name] for name in ("_state_channels", "_image_first") if name in source.config}
    model.register_to_config(**facts)


def public_config(model: Any) -> dict[str, Any]:
    """A diffusers config without its private keys, which would keep ``from_config`` from taking changes."""
    return {name: value for name, value in dict(model.config).items() if not name.startswith("_")}


def with_image(network: Any, channels: int) -> Any:
    """A copy of a U-Net's network that takes the condition ``image`` (B, channels, H, W) beside the state, and does not
    heed it yet: the weights of the first convolution for it are zeros (as of the latents in arXiv 2211.09800).

    Raises:
        ValueError: for a network without a first convolution of its own.
    """
    teacher = getattr(network, "model", None)
    if not isinstance(getattr(teacher, "conv_in", None), nn.Conv2d):
        raise ValueError(f"student.image widens the first convolution of a U-Net, a {type(network).__name__} has none")
    config = public_config(teacher)
    first = config["in_channels"]
    model = type(teacher).from_config({**config, "in_channels": first + channels})  # pyright: ignore
    keep_facts(model, teacher)
    weights = teacher.state_dict()  # pyright: ignore
    wide = torch.zeros_like(model.conv_in.weight)
    wide[:, :first] = weights["conv_in.weight"]
    model.load_state_dict({**weights, "conv_in.weight": wide})
    return type(network)(model.to(next(network.parameters())).train(network.training))


def set_size(model: Any, shape: tuple[int, ...]) -> None:
    """Have the config of a convolutional model, which takes pictures of any size, name that of ``shape`` (C, H, W)."""
    if len(shape) == 3:
        size = shape[1] if shape[1] == shape[2] else shape[1:]
        if model.config["sample_size"] != size:
            model.register_to_config(sample_size=size)
