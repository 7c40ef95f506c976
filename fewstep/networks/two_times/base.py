"""What all models with a second time have in common: they predict the average over the times from s to t.

The first time goes where the model's own time goes. The second goes in as ``second_time`` says:

* ``t``: an embedding of t is added to that of s; its last layer starts at zero, so that the model starts as it was;
* ``span``: the same of t - s;
* ``late``: the last blocks are told t in the place of s, by the same embedding (arXiv 2510.24474): no new weights. They
  are ``late_share`` of the blocks, or by default a third of a transformer's and the up blocks of a U-Net.

At s = t a new model of each kind predicts what the one it was made of does, to the last bit. Where it is
``told_guidance``, it has one more input, the strength of guidance (arXiv 2210.03142), as silent at first; and where
that is ``interval``, two more, the times between which guidance acts (arXiv 2512.02012).

It is part of the ``two_times.py`` of an export, as are the files beside it, so they need torch and diffusers alone.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

SECOND_TIMES = ("t", "span", "late")
# The keys of a config that such a model has more, and what they are where nothing is said.
_KEYS: dict[str, Any] = {"second_time": "t", "told_guidance": False, "late_share": None}


class TwoTimes:
    """What a model below has more than its parent: some keys of its config, and ``predict``."""

    noisiest = 1000.0  # the timestep of pure noise: how large a number it is told may be
    last_share = 1 / 3  # of the blocks, told t in the place of s where the second time is ``late``

    def __init__(
        self,
        *args: Any,
        second_time: str = "t",
        told_guidance: bool | str = False,
        late_share: float | None = None,
        **config: Any,
    ) -> None:
        if second_time not in SECOND_TIMES:
            raise ValueError(f"second_time is {second_time!r}: it is one of {', '.join(SECOND_TIMES)}")
        if told_guidance not in (False, True, "interval"):
            raise ValueError(f"told_guidance is {told_guidance!r}: it is true, false or 'interval'")
        if late_share is not None and (second_time != "late" or not 0 < late_share < 1):
            raise ValueError(
                f"late_share is {late_share} and second_time {second_time!r}: it is a share of the blocks between 0 "
                "and 1, and belongs to 'late'"
            )
        super().__init__(*args, **config)
        self.second_time, self.told_guidance, self.late_share = second_time, told_guidance, late_share
        model: Any = self
        model.register_to_config(second_time=second_time, told_guidance=told_guidance, late_share=late_share)
        self.take_rows(late=second_time == "late", guided=3 if told_guidance == "interval" else int(told_guidance))

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        models = (c for c in cls.__mro__ if hasattr(c, "from_config") and not issubclass(c, TwoTimes))
        parent = next(models, None)
        if parent is None:
            return

        def make(self: Any, *args: Any, **config: Any) -> None:
            TwoTimes.__init__(self, *args, **config)

        # diffusers reads off the signature what belongs into a config.
        keys = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default) for name, default in _KEYS.items()
        ]
        signature: Any = inspect.signature(parent.__init__)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        made: Any = make
        made.__signature__ = signature.replace(parameters=[*own, *keys])
        cls.__init__ = made

    def take_rows(self, late: bool, guided: int) -> None:
        """Have the model take rows of times, and of ``guided`` numbers on guidance, in the place of times."""
        raise NotImplementedError

    def by_turn(self, blocks: Any) -> list[tuple[Any, bool]]:
        """Blocks, and whether each is among the last, which there is one of at least; so there is of the first, where
        there are two."""
        last = min(round((self.late_share or self.last_share) * len(blocks)), len(blocks) - 1)
        return [(block, k >= len(blocks) - max(1, last)) for k, block in enumerate(blocks)]

    def predict(self, x: Tensor, s: Tensor, t: Tensor, guidance: Tensor | None = None, **cond: Any) -> Tensor:
        """The prediction at x (B, ...), averaged from s to t, both (B,) in timesteps of the model.

        A module around this one, such as a compiled one, may stand in for ``self``: it calls that.

        Args:
            guidance: its strength (B,), for a model that is told it; 1, which is none, if not given. Or (B, 3), with
                the times (0 noise, 1 data) between which it acts, for one that is told these; else all times.
            cond: the conditions of the model, by their names in diffusers.
        """
        raise NotImplementedError

    def rows(self, s: Tensor, t: Tensor, guidance: Tensor | None) -> Tensor:
        """What the model is told beside s: (B, 1), or (B, 2) with the strength of guidance behind, or (B, 4) with the
        interval where it acts behind that.

        Raises:
            ValueError: a strength for a model that is told none, an interval for one that is told no interval.
        """
        if guidance is not None and not self.told_guidance:
            raise ValueError(f"guidance for a {type(self).__name__} that is told no strength of it: leave it out")
        second = t - s if self.second_time == "span" else t
        if not self.told_guidance:
            return second[:, None]
        strength = torch.ones_like(t) if guidance is None else guidance.to(t)
        # Strengths are a few units, and ends of an interval parts of one; the frequencies are made for times.
        unit = self.noisiest / 10
        if self.told_guidance == "interval":
            strength, low, high = strength.unbind(1) if strength.ndim == 2 else (strength, 0 * t, 0 * t + 1)
            return torch.stack([second, unit * strength, self.noisiest * low, self.noisiest * high], dim=-1)
        if strength.ndim == 2:
            raise ValueError(f"guidance with an interval, for a {type(self).__name__} that is told the strength alone")
        return torch.stack([second, unit * strength], dim=-1)
