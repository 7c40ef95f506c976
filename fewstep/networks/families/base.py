"""What the networks of all families have in common: those of a field, and those of a flow map."""

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.common.errors import shown
from fewstep.networks.channels import state_channels
from fewstep.networks.two_times import code_of


class OfDiffusers(nn.Module):
    """A network that calls a ``model`` of diffusers, and knows from its config what its samples are."""

    # The file of the family in ``fewstep.networks.two_times``; the layer that sees the state, empty where an image
    # cannot go in beside it; and how many numbers of one channel of the state the config counts as one channel each.
    code: ClassVar[str]
    first: ClassVar[str] = "conv_in"
    patch: ClassVar[int] = 1
    # Modules inside a block that the model calls from outside of it too: units of their own where it is sharded.
    apart: ClassVar[tuple[str, ...]] = ()
    # Whether all models of the class have a second time by themselves.
    always_map: ClassVar[bool] = False
    # Whether its pipeline names the noise levels of its steps, down to one over their number, or leaves them to the
    # scheduler.
    names_sigmas: ClassVar[bool] = True
    # Whether its pipeline counts the channels of a sample for its tokens, where noise levels follow their number.
    counts_channels: ClassVar[bool] = False
    # Why it cannot be sharded, and the way out; empty where it can.
    needs_whole: ClassVar[str] = ""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        # How the pipelines of its family call the model, on a state x (B, C, H, W) and a timestep (B,).
        self.call = code_of(self.code).call

    @property
    def has_second_time(self) -> bool:
        """Whether the model of diffusers has a second time by itself, so that it is a flow map."""
        return self.always_map

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
        return self.model.config["in_channels"] // self.patch - self.channels

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
                f"64`, --data.size 64 for images, --data.shape '[{self.channels}, 64, 64]' for samples of the "
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
        return "guidance" in self.condition_shapes(1)

    def check_guidance(self, guidance: Tensor | None) -> None:
        """That a strength of guidance is given to a model alone that takes it.

        Raises:
            ValueError: it does not.
        """
        if guidance is not None and not self.takes_guidance:
            name = type(self.model).__name__
            raise ValueError(f"this {name} takes no guidance (B,), its config has no guidance_embeds")

    def enable_gradient_checkpointing(self) -> None:
        """Have the model compute again, in the backward pass, what it had in the forward one."""
        own = getattr(code_of(self.code), "checkpoint_blocks", None)
        if own is None:
            self.model.enable_gradient_checkpointing()
        else:  # where diffusers' own way fails
            own(self.model)

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """The conditions without which it cannot be called, and the shape of one sample's row of each.

        Args:
            tokens: how long a prompt is, for a model of text.
        """
        raise NotImplementedError

    def blank(
        self, shape: tuple[int, ...], rows: int, tokens: int, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """Zeros for all that it is told beside states of ``shape``, (rows, ...) each."""
        shapes = self.condition_shapes(tokens)
        if self.image_channels:
            shapes["image"] = (self.image_channels, *shape[1:])
        kinds = {"class_labels": torch.long} if self.classes else {}
        return {name: torch.zeros(rows, *shape, dtype=kinds.get(name), device=device) for name, shape in shapes.items()}

    @property
    def needed(self) -> list[str]:
        """The names of the conditions without which it cannot be called."""
        return list(self.condition_shapes(1))

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


class Sized(OfDiffusers):
    """One whose config does not say how large its latents are.

    Args:
        size: their height and width, or all sides, for ``shape`` alone; else the ``usual`` ones.
    """

    usual: ClassVar[int | tuple[int, ...]]

    def __init__(self, model: Any, size: int | tuple[int, ...] | None = None) -> None:
        super().__init__(model)
        self.size = self.usual if size is None else size

    @property
    def shape(self) -> tuple[int, ...]:
        """That of one sample, (C, H, W), or of a video (C, F, H, W)."""
        return self.channels, *((self.size, self.size) if isinstance(self.size, int) else self.size)


class OfSignals(OfDiffusers):
    """One of signals: its config says how long they are."""

    first = ""  # an image cannot go in beside the state

    @property
    def shape(self) -> tuple[int, ...]:
        """That of one sample, (C, L).

        Raises:
            ValueError: its config has no length.
        """
        length = self.model.config["sample_size"]
        if type(length) is not int or length < 1:
            raise ValueError(
                f"the config of this {type(self.model).__name__} has the sample_size {shown(length)}, and the length "
                "of its signals is needed: write it into its config.json"
            )
        return self.channels, length

    @property
    def rate(self) -> int | None:
        """How many numbers of a signal are a second, where its config says so."""
        return self.model.config.get("sample_rate")


def _with_conditions(forward: Any, one_time: Any) -> Any:
    """``forward``, whose signature ends in the conditions of that of a network of one time: which a network takes is
    read off it."""
    own, signature = inspect.signature(forward), inspect.signature(one_time)
    first, cond = list(own.parameters.values())[:-1], list(signature.parameters.values())[3:]
    cond = [p.replace(kind=p.KEYWORD_ONLY) for p in cond if p.name not in own.parameters]
    forward.__signature__ = signature.replace(parameters=[*first, *cond])
    return forward


class EndNetwork(OfDiffusers):
    """A network of one time as that of a flow map which knows the way to t = 1 alone, as consistency models do:
    ``net(x, s, t, **cond)`` does not hear t, so that the model is of diffusers' own class and its pipelines run it."""

    second_time = "none"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        one_time: Any = cls.__mro__[2].forward

        def forward(self: Any, x: Tensor, s: Tensor, t: Tensor, **cond: Any) -> Tensor:
            return one_time(self, x, s, **cond)

        cls.forward = _with_conditions(forward, one_time)


class TwoTimeNetwork(OfDiffusers):
    """What the networks below have in common: ``net(x, s, t, guidance=None, **cond)``, with the conditions of the
    network of one time. ``guidance`` (B,) is its strength, for a model that is told it."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if TwoTimeNetwork not in cls.__bases__:  # made of one that has its forward
            return

        def forward(self: Any, x: Tensor, s: Tensor, t: Tensor, guidance: Tensor | None = None, **cond: Any) -> Tensor:
            return self.predict(x, s, t, guidance, **cond)

        cls.forward = _with_conditions(forward, cls.__mro__[2].forward)

    def predict(self, x: Tensor, s: Tensor, t: Tensor, guidance: Tensor | None = None, **cond: Any) -> Tensor:
        """The prediction at x (B, ...), averaged from s to t, (B,) each.

        Raises:
            ValueError: a condition that the model needs is missing, or a strength of guidance that it is not told.
        """
        self.need(**cond, guidance=guidance)
        if guidance is not None and not self.takes_guidance:
            name = type(self.model).__name__
            raise ValueError(f"this {name} is told no strength of guidance: FlowMap.from_field(..., guidance=True)")
        if self.is_stock:
            told = {} if guidance is None else {"guidance": guidance}
            return self.call(self.model, x, s, **told, **cond, second=t)
        return self.model.predict(x, s, t, guidance, **cond)

    @property
    def is_stock(self) -> bool:
        """Whether the model is of diffusers' own class."""
        return not hasattr(self.model, "predict")

    @property
    def second_time(self) -> str:
        """How the second time goes in: t, span or late (see ``fewstep.networks.two_times``)."""
        return "t" if self.is_stock else self.model.second_time

    @property
    def is_told_alike(self) -> bool:
        """Whether it wants both times in the same timesteps, as it holds the one against the other."""
        return self.second_time != "t"

    @property
    def takes_guidance(self) -> bool:
        return bool(getattr(self.model, "told_guidance", False)) or super().takes_guidance

    @property
    def takes_interval(self) -> bool:
        """Whether it is told the times between which guidance acts, the condition ``guidance`` (B, 3)."""
        return getattr(self.model, "told_guidance", False) == "interval"
