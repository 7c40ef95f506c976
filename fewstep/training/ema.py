"""A slow copy of a model: the weights that are evaluated and exported, and the target that some objectives want."""

from copy import deepcopy
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from fewstep.common.shards import local

Model = TypeVar("Model", bound=nn.Module)


class Ema(Generic[Model]):
    """An exponential moving average of a model's weights, kept in float32 (float64 for a float64 model).

    After each update of the model, ``shadow = decay * shadow + (1 - decay) * weight``; buffers are copied.
    ``module`` is a model like the original, in eval mode and without gradients, to be called directly. What is frozen
    in the model (the base of a LoRA) is not averaged, and not copied: ``module`` holds the model's own tensors there.

    Args:
        model: what to follow; copied now.
        decay: in [0, 1); 0 follows at once.
        warmup: use min(decay, (1 + n) / (10 + n)) at update n, so that a short run is not held back by its first,
            untrained weights. Off unless asked for: it changes what the decay means.
        lent: begin on the memory of the model's own weights, where both are about to be shared out: each process then
            takes its rows of either, and :meth:`follow` is called before the first update.
    """

    def __init__(self, model: Model, decay: float, warmup: bool = False, *, lent: bool = False) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"an EMA decay must be in [0, 1), got {decay}")
        self.decay, self.warmup = decay, warmup
        frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
        known: dict[int, Any] = {**frozen}
        if lent:
            known |= {id(p): nn.Parameter(p.detach()) for p in model.parameters() if p.requires_grad}
        self.module: Model = deepcopy(model, known).eval().requires_grad_(False)
        averaged = [p for p in self.module.parameters() if id(p) not in frozen]
        for tensor in (*averaged, *self.module.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(torch.promote_types(tensor.dtype, torch.float32))
        if not lent:
            self.follow(model)

    def follow(self, model: nn.Module) -> None:
        """Average the tensors that both models hold now: they are others once the models were sharded, where each
        process averages its own share."""
        both = zip(self.module.parameters(), model.parameters(), strict=True)
        moving = [(shadow, weight) for shadow, weight in both if weight.requires_grad]
        for shadow, weight in moving:
            own, lender = local(shadow), local(weight)
            if own.numel() and own.data_ptr() == lender.data_ptr():  # it was not shared out
                shadow.data = shadow.data.clone()
        self._shadows: list[Tensor] = [shadow for shadow, _ in moving]
        self._weights: list[Tensor] = [weight for _, weight in moving]
        self._buffers: list[Tensor] = list(self.module.buffers())
        self._sources: list[Tensor] = list(model.buffers())

    def decay_at(self, step: int) -> float:
        """The decay used for update number ``step`` (from 0)."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the model by one update; ``step`` counts from 0."""
        shadows = [local(shadow) for shadow in self._shadows]
        weights = [local(w).to(s.dtype) for w, s in zip(self._weights, shadows, strict=True)]
        torch._foreach_lerp_(shadows, weights, 1.0 - self.decay_at(step))
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._sources)
