"""diffusers' ``UNet2DModel`` as a field's network (one time) and as a student (two).

Both are called with timesteps in the units the model was trained with, which the field's native path supplies.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import UNet2DModel


class OfDiffusers(nn.Module):
    """A network that calls a ``model`` of diffusers, and knows from its config what its samples are."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def shape(self) -> tuple[int, int, int]:
        """That of one sample, (C, H, W)."""
        return sample_shape(self.model)

    @property
    def classes(self) -> int:
        """How many ``class_labels`` it knows, 0 for none."""
        return self.model.config.get("num_class_embeds") or 0


class UNet(OfDiffusers):
    """``net(x, timestep, class_labels=None)`` over a diffusers ``UNet2DModel``; images (B, C, H, W)."""

    model: "UNet2DModel"

    def forward(
        self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None, image: Tensor | None = None
    ) -> Tensor:
        return mean_part(self.model(beside(self.model, x, image), timestep, class_labels=class_labels).sample, x)

    def with_second_time(self, guidance: bool = False) -> "TwoTimeUNet":
        """The same network with a second time that is silent, as a student starts."""
        return TwoTimeUNet.from_model(self.model, guidance)


class TwoTimeUNet(OfDiffusers):
    """``net(x, s, t, class_labels=None, image=None, guidance=None)``, both times in timesteps of the model.

    The second time enters where diffusers has a slot for it: the model's class embedding. A model without classes
    gets ``class_embed_type="timestep"``, which stock diffusers loads and runs; one with classes becomes a
    :class:`~fewstep.networks.class_time_unet.ClassTimeUNet2DModel`, and one that is told the strength of guidance (B,)
    a ``GuidedTimeUNet2DModel``. All new embeddings start as copies of the model's time embedding with a last layer of
    zeros.
    """

    model: "UNet2DModel"

    @classmethod
    def from_model(cls, teacher: "UNet2DModel", guidance: bool = False) -> "TwoTimeUNet":
        """A student that starts with the weights, and the function, of ``teacher``; with ``guidance``, with an input
        for its strength.

        Raises:
            ValueError: if the teacher's class embedding is neither a table of labels nor absent.
        """
        from diffusers import UNet2DModel

        from fewstep.networks.class_time_unet import ClassTimeUNet2DModel, GuidedTimeUNet2DModel

        config = public_config(teacher)
        if config["class_embed_type"] is not None:
            raise ValueError(
                f"a UNet2DModel with class_embed_type={config['class_embed_type']!r} has no room for a second time: "
                "give FlowMap.from_field a two-time network of your own"
            )
        weights = teacher.state_dict()
        has_classes = config["num_class_embeds"] is not None
        if has_classes or guidance:
            model: Any = (GuidedTimeUNet2DModel if guidance else ClassTimeUNet2DModel).from_config(config)
            new = [model.class_embedding.second, *([model.class_embedding.strength] if guidance else [])]
        else:
            model = UNet2DModel.from_config({**config, "class_embed_type": "timestep"})
            new = [model.class_embedding]
        if has_classes:
            weights["class_embedding.label.weight"] = weights.pop("class_embedding.weight")
        model.load_state_dict(weights, strict=False)
        for embedding in new:
            embedding.load_state_dict(teacher.time_embedding.state_dict())
            nn.init.zeros_(embedding.linear_2.weight)
            nn.init.zeros_(embedding.linear_2.bias)
        # The teacher's mode too: dropout that is off in one and on in the other would part them.
        return cls(model).to(next(teacher.parameters())).train(teacher.training)

    def forward(
        self,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        class_labels: Tensor | None = None,
        image: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        if self.classes and class_labels is None:
            raise ValueError("this UNet2DModel has classes: class_labels (B,) are needed")
        if guidance is not None and not self.takes_guidance:
            raise ValueError("this UNet2DModel is told no strength of guidance: FlowMap.from_field(..., guidance=True)")
        second = t
        if self.classes or self.takes_guidance:
            label = torch.zeros_like(t) if class_labels is None else class_labels.to(t.dtype)
            strength = torch.ones_like(t) if guidance is None else guidance.to(t.dtype)
            second = torch.stack([label, t, *([strength] if self.takes_guidance else [])], dim=-1)
        return mean_part(self.model(beside(self.model, x, image), s, class_labels=second).sample, x)

    @property
    def takes_guidance(self) -> bool:
        """Whether it is told the strength of guidance."""
        return getattr(self.model.class_embedding, "strength", None) is not None


def public_config(model: Any) -> dict[str, Any]:
    """A diffusers config without its private keys, which would keep ``from_config`` from taking changes."""
    return {name: value for name, value in dict(model.config).items() if not name.startswith("_")}


def sample_shape(model: Any) -> tuple[int, int, int]:
    """(C, H, W) of one sample of a diffusers model whose config has ``in_channels`` and ``sample_size``.

    Raises:
        ValueError: its config has no size.
    """
    size = model.config["sample_size"]
    if size is None:
        raise ValueError(f"the config of this {type(model).__name__} has no sample_size: say the shape of the samples")
    height, width = (size, size) if isinstance(size, int) else size
    # Fewer go out than in where an image stands beside the state, more where a variance is predicted too.
    channels = model.config["in_channels"]
    return min(channels, model.config["out_channels"] or channels), height, width


def mean_part(output: Tensor, x: Tensor) -> Tensor:
    """The first half of the channels where the model also predicts a variance."""
    return output[:, : x.shape[1]] if output.shape[1] == 2 * x.shape[1] else output


def beside(model: Any, x: Tensor, image: Tensor | None) -> Tensor:
    """What goes into a U-Net: the state (B, C, H, W), and behind it the channels of an image it is conditioned on.

    Raises:
        ValueError: they are not as many channels as the model takes.
    """
    both = x if image is None else torch.cat([x, image.to(x)], dim=1)
    if both.shape[1] != (takes := model.config["in_channels"]):
        own = f"the state has {x.shape[1]}" + ("" if image is None else f" and the condition image {image.shape[1]}")
        raise ValueError(f"this {type(model).__name__} takes {takes} channels, {own}: they must add up")
    return both


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
