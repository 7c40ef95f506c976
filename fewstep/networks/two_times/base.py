"""What all models with a second time have in common: they predict the average over the times from s to t.

The first time goes where the model's own time goes. The second goes in as ``second_time`` says:

* ``t``: an embedding of t is added to that of s; its last layer starts at zero, so that the model starts as it was;
* ``span``: the same of t - s;
* ``late``: the last blocks are told t in the place of s, by the same embedding (arXiv 2510.24474): no new weights.

At s = t a new model of each kind predicts what the one it was made of does, to the last bit. Where it is
``told_guidance``, it has one more input, the strength of guidance (arXiv 2210.03142), as silent at first.

It is part of the ``two_times.py`` of an export, as are the files beside it, so they need torch and diffusers alone.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

SECOND_TIMES = ("t", "span", "late")


class TwoTimes:
    """What a model below has more than its parent: two keys of its config, and ``predict``."""

    def __init__(self, *args: Any, second_time: str = "t", told_guidance: bool = False, **config: Any) -> None:
        if second_time not in SECOND_TIMES:
            raise ValueError(f"second_time is {second_time!r}: it is one of {', '.join(SECOND_TIMES)}")
        super().__init__(*args, **config)
        self.second_time, self.told_guidance = second_time, told_guidance
        model: Any = self
        model.register_to_config(second_time=second_time, told_guidance=told_guidance)
        self.take_rows(late=second_time == "late", guided=told_guidance)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        parent = next((c for c in cls.__mro__ if c.__module__.startswith("diffusers.")), None)
        if parent is None:
            return

        def make(self: Any, *args: Any, **config: Any) -> None:
            TwoTimes.__init__(self, *args, **config)

        # diffusers reads off the signature what belongs into a config.
        keys = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
            for name, default in (("second_time", "t"), ("told_guidance", False))
        ]
        signature: Any = inspect.signature(parent.__init__)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        made: Any = make
        made.__signature__ = signature.replace(parameters=[*own, *keys])
        cls.__init__ = made

    def take_rows(self, late: bool, guided: bool) -> None:
        """Have the model take rows of times, and of the strength of guidance, in the place of times."""
        raise NotImplementedError

    def predict(self, x: Tensor, s: Tensor, t: Tensor, guidance: Tensor | None = None, **cond: Any) -> Tensor:
        """The prediction at x (B, ...), averaged from s to t, both (B,) in timesteps of the model.

        A module around this one, such as a compiled one, may stand in for ``self``: it calls that.

        Args:
            guidance: its strength (B,), for a model that is told it; 1, which is none, if not given.
            cond: the conditions of the model, by their names in diffusers.
        """
        raise NotImplementedError

    def rows(self, s: Tensor, t: Tensor, guidance: Tensor | None) -> Tensor:
        """What the model is told beside s: (B, 1), or (B, 2) with the strength of guidance behind.

        Raises:
            ValueError: a strength for a model that is told none.
        """
        if guidance is not None and not self.told_guidance:
            raise ValueError(f"guidance for a {type(self).__name__} that is told no strength of it: leave it out")
        second = t - s if self.second_time == "span" else t
        if not self.told_guidance:
            return second[:, None]
        strength = torch.ones_like(t) if guidance is None else guidance.to(t)
        # Strengths are a few units; the frequencies of the embedding are made for hundreds.
        return torch.stack([second, 100 * strength], dim=-1)
