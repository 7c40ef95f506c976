"""What lies in memory through a whole training, whole or a process's share of it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from fewstep.training.eight_bits import bytes_of_moments


@dataclass(frozen=True)
class Part:
    """What lies in memory through the whole training: ``numbers`` of them, in ``bytes``."""

    name: str
    numbers: int
    bytes: int


def parts_of(
    trained: list[nn.Parameter],
    student: nn.Module,
    teacher: nn.Module | None,
    objective: nn.Module,
    average: nn.Module | None,
    target: nn.Module | None,
    eight_bit: bool = False,
    kept: Callable[[Tensor], int] = Tensor.numel,
) -> tuple[Part, ...]:
    """What lies in memory, each tensor once: what teacher or copies share with the student is its own.

    Args:
        trained: what the optimizers change.
        eight_bit: whether these keep moments in 8 bits.
        kept: how many of a tensor's numbers are kept.
    """
    seen: set[int] = set()

    def part(name: str, tensors: Iterable[Tensor], times: int = 1) -> Part:
        numbers = [(times * kept(tensor), tensor.itemsize) for tensor in tensors]
        return Part(name, sum(count for count, _ in numbers), sum(count * size for count, size in numbers))

    def new(name: str, tensors: Iterable[Tensor]) -> Part:
        found = [tensor for tensor in tensors if id(tensor) not in seen]
        seen.update(map(id, found))
        return part(name, found)

    parts = [
        new("weights that train", trained),
        new("weights that stay", tensors_of(student)),
        new("teacher", tensors_of(teacher)),
        new("objective", tensors_of(objective)),
        new("averaged weights", tensors_of(average)),
        new("slow copy of the objective", tensors_of(target)),
        part("gradients", trained),
        part("two moments of AdamW", trained, 2),
    ]
    if eight_bit:
        counts = [kept(tensor) for tensor in trained]
        parts[-1] = Part("two moments in 8 bits", 2 * sum(counts), sum(map(bytes_of_moments, counts)))
    return tuple(part for part in parts if part.numbers)


def tensors_of(module: nn.Module | None) -> list[Tensor]:
    """All tensors of a module."""
    return [] if module is None else [*module.parameters(), *module.buffers()]
