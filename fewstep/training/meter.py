"""The numbers of each step: their means to log, and the watch for one that is not finite."""

import math

import torch
from torch import Tensor

from fewstep.common.distributed import World
from fewstep.common.errors import TrainingError


class Meter:
    """Collects the numbers of every step as tensors and reads them in one go, so that a GPU need not be waited for
    at each step. Nothing is written to disk before ``read`` has found every number finite.

    Args:
        may_overflow: gradient norms need not be finite: fp16's scaler skips such updates. They are left out.
    """

    def __init__(self, may_overflow: bool = False) -> None:
        self._may_overflow = may_overflow
        self.sums: dict[str, tuple[float, int]] = {}
        self._steps: list[tuple[int, dict[str, Tensor], dict[str, Tensor]]] = []

    def add(self, step: int, values: dict[str, Tensor], times: dict[str, Tensor] | None = None) -> None:
        """Note detached scalars of update number ``step`` (from 1), with the (s, t) that the loss terms saw."""
        self._steps.append((step, values, times or {}))

    def read(self) -> None:
        """Read what was added since the last time.

        Raises:
            TrainingError: a number is not finite; names the step, the terms and their times.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return
        scalars = [value for _, values, _ in steps for value in values.values()]
        numbers = iter(torch.stack([value.to(scalars[0].device) for value in scalars]).tolist())
        for step, values, times in steps:
            found = {name: next(numbers) for name in values}
            if self._may_overflow:
                found = {k: v for k, v in found.items() if math.isfinite(v) or not k.startswith("grad_norm")}
            if not all(map(math.isfinite, found.values())):
                raise TrainingError(_not_finite(step, found, times))
            for name, number in found.items():
                total, count = self.sums.get(name, (0.0, 0))
                self.sums[name] = total + number, count + 1

    def share(self, world: World) -> None:
        """Give every process the mean of all sums, so that the checkpoint of one stands for all."""
        totals = iter(world.sum([total for total, _ in self.sums.values()]))
        self.sums = {name: (next(totals) / world.size, count) for name, (_, count) in self.sums.items()}

    def means(self, world: World) -> dict[str, float]:
        """The means since the last call, over all processes; starts anew."""
        sums, self.sums = self.sums, {}
        totals = world.sum([part for pair in sums.values() for part in pair])
        return {name: totals[2 * i] / totals[2 * i + 1] for i, name in enumerate(sums)}


def _not_finite(step: int, found: dict[str, float], times: dict[str, Tensor]) -> str:
    bad = {name: number for name, number in found.items() if not math.isfinite(number)}
    if not any(name.startswith("loss") for name in bad):
        names = ", ".join(f"{name} = {number}" for name, number in bad.items())
        return f"step {step}: {names} though the loss is finite. {_ADVICE}"
    # The terms say more than their sum, where they are what went wrong.
    terms = {name: number for name, number in bad.items() if name != "loss"} or bad
    parts = []
    for name, number in terms.items():
        seen = times.get(name.removeprefix("loss/"))
        parts.append(f"{name} = {number}{'' if seen is None or not len(seen) else _range(seen)}")
    return f"step {step}: {', '.join(parts)}. {_ADVICE}"


_ADVICE = (
    "The weights are spoilt from here on; the last checkpoint is whole. Try a lower learning rate, clip=1.0, or "
    "float32 if this ran in half precision"
)


def _range(times: Tensor) -> str:
    (s_low, t_low), (s_high, t_high) = times.amin(0).tolist(), times.amax(0).tolist()
    return f" on rows with s in [{s_low:.4g}, {s_high:.4g}], t in [{t_low:.4g}, {t_high:.4g}]"
