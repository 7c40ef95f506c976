"""diffusers' ``UNet2DModel`` as a field's network (one time) and as a student (two).

Both are called with timesteps in the units the model was trained with, which the field's native path supplies.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import UNet2DModel


class UNet(nn.Module):
    """``net(x, timestep, class_labels=None)`` over a diffusers ``UNet2DModel``; images (B, C, H, W)."""

    def __init__(self, model: "UNet2DModel") -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return _as_image(self.model(x, timestep, class_labels=class_labels).sample, x)

    def with_second_time(self) -> "TwoTimeUNet":
        """The same network with a second time that is silent, as a student starts."""
        return TwoTimeUNet.from_model(self.model)


class TwoTimeUNet(nn.Module):
    """``net(x, s, t, class_labels=None)``, both times in timesteps of the model.

    The second time enters where diffusers has a slot for it: the model's class embedding. A model without classes
    gets ``class_embed_type="timestep"``, which stock diffusers loads and runs; one with classes becomes a
    :class:`~fewstep.networks.class_time_unet.ClassTimeUNet2DModel`. Either starts as a copy of the model's time
    embedding with a last layer of zeros.
    """

    def __init__(self, model: "UNet2DModel") -> None:
        super().__init__()
        self.model = model
        self.classes = model.config["num_class_embeds"] is not None

    @classmethod
    def from_model(cls, teacher: "UNet2DModel") -> "TwoTimeUNet":
        """A student that starts with the weights, and the function, of ``teacher``.

        Raises:
            ValueError: if the teacher's class embedding is neither a table of labels nor absent.
        """
        from diffusers import UNet2DModel

        from fewstep.networks.class_time_unet import ClassTimeUNet2DModel

        config = public_config(teacher)
        if config["class_embed_type"] is not None:
            raise ValueError(
                f"a UNet2DModel with class_embed_type={config['class_embed_type']!r} has no room for a second time: "
                "give FlowMap.from_field a two-time network of your own"
            )
        weights = teacher.state_dict()
        if config["num_class_embeds"] is None:
            model: Any = UNet2DModel.from_config({**config, "class_embed_type": "timestep"})
            second = model.class_embedding
        else:
            model = ClassTimeUNet2DModel.from_config(config)
            second = model.class_embedding.second
            weights["class_embedding.label.weight"] = weights.pop("class_embedding.weight")
        model.load_state_dict(weights, strict=False)
        second.load_state_dict(teacher.time_embedding.state_dict())
        nn.init.zeros_(second.linear_2.weight)
        nn.init.zeros_(second.linear_2.bias)
        # The teacher's mode too: dropout that is off in one and on in the other would part them.
        return cls(model).to(next(teacher.parameters())).train(teacher.training)

    def forward(self, x: Tensor, s: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        second = t
        if self.classes:
            if class_labels is None:
                raise ValueError("this UNet2DModel has classes: class_labels (B,) are needed")
            second = torch.stack([class_labels.to(t.dtype), t], dim=-1)
        return _as_image(self.model(x, s, class_labels=second).sample, x)


def public_config(model: Any) -> dict[str, Any]:
    """A diffusers config without its private keys, which would keep ``from_config`` from taking changes."""
    return {name: value for name, value in dict(model.config).items() if not name.startswith("_")}


def _as_image(output: Tensor, x: Tensor) -> Tensor:
    """The first half of the channels where the model also predicts a variance."""
    return output[:, : x.shape[1]] if output.shape[1] == 2 * x.shape[1] else output
