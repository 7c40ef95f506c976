"""One seed decides all: where every random number comes from.

Randomness is handed around as *generators*: one ``torch.Generator``, or a sequence of them that share the rows of a
batch equally, in order. A sequence of B generators fixes every sample by itself (sampling); a sequence of one
generator per chunk of rows gives several processes the rows that one process would have seen (training).

Numbers are drawn on the CPU, whatever the device of the result, so that a GPU sees the bits that a CPU sees.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator]

_MASK = (1 << 64) - 1


def mix(*words: int) -> int:
    """A 32-bit hash of integers (splitmix64 over the words): far apart for words that are near."""
    state = 0x9E3779B97F4A7C15
    for word in words:
        state = (state ^ (word & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state & 0xFFFFFFFF


def generator(*words: int) -> torch.Generator:
    """The CPU generator that belongs to these integers, such as ``(seed, step, chunk)``."""
    return torch.Generator().manual_seed(mix(*words))


def sample_generators(seed: int, indices: Sequence[int] | range) -> list[torch.Generator]:
    """One generator per sample: sample i of a seed has the same noise in any batch and on any number of processes.

    Torch's CPU generator keeps 32 bits of its seed; consecutive ones within a seed, so that no two samples of a run
    share theirs, begun at a hash of the seed, so that the runs of seeds 0 and 1 do not overlap.
    """
    start = mix(seed)
    return [torch.Generator().manual_seed((start + i) & 0xFFFFFFFF) for i in indices]


def _draw(kind: str, shape: tuple[int, ...], generators: Generators, dtype: torch.dtype) -> Tensor:
    draw = getattr(torch, kind)
    if isinstance(generators, torch.Generator):
        return draw(shape, generator=generators, dtype=dtype, device=generators.device)
    if len(generators) == 1:
        return draw(shape, generator=generators[0], dtype=dtype, device=generators[0].device)
    rows, extra = divmod(shape[0], len(generators))
    if extra:
        raise ValueError(f"{shape[0]} rows cannot be shared equally by {len(generators)} generators")
    return torch.cat([draw((rows, *shape[1:]), generator=g, dtype=dtype, device=g.device) for g in generators])


def normal(like: Tensor, generators: Generators) -> Tensor:
    """Standard normal numbers of the shape, type and device of ``like`` (B, ...)."""
    # Drawn in float32 at least: half-precision runs then start from the same noise as full ones.
    dtype = torch.promote_types(like.dtype, torch.float32)
    drawn = _draw("randn", tuple(like.shape), generators, dtype)
    return drawn.to(like, non_blocking=like.is_cuda)  # the copy waits for nothing that a GPU is at


def uniform(rows: int | tuple[int, ...], generators: Generators, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in [0, 1), shape (rows,) or the whole shape (B, ...), on the CPU unless the generator lives
    elsewhere."""
    return _draw("rand", (rows,) if isinstance(rows, int) else rows, generators, dtype)


def chunk_rows(rows: int, generators: Generators) -> int:
    """How many rows in a run share a generator: what is split by position within it is split alike on any machine."""
    return rows if isinstance(generators, torch.Generator) else rows // len(generators)


def same_draws(device: torch.device) -> Callable[[], None]:
    """A function that brings torch's own generator of a device, from which dropout draws, back to where it is now: what
    is called after it sees the same dropout as what was called before it."""
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device)
        return lambda: torch.cuda.set_rng_state(state, device)
    state = torch.get_rng_state()
    return lambda: torch.set_rng_state(state)
