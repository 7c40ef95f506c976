"""How the rows of a batch are shared out: in whole chunks, to processes and micro-batches. Nothing heavy is imported
here, so that a recipe is refused before anything is."""

from math import gcd

_CHUNK = 64


def default_chunk(batch: int) -> int:
    """The largest divisor of ``batch`` up to 64: from the batch alone, never from the number of processes."""
    return max(size for size in range(1, min(batch, _CHUNK) + 1) if batch % size == 0)


def check_shares(batch: int, chunk: int, accumulate: int = 1, processes: int = 1) -> None:
    """Raise ValueError where a batch cannot be shared out in whole chunks; names a batch, and a chunk, that can."""
    share = chunk * processes * accumulate
    if batch % share:
        fits, rows = max(1, round(batch / share)) * share, batch // (processes * accumulate)
        smaller = f", or batch={batch} with chunk={gcd(rows, chunk)}" if rows * processes * accumulate == batch else ""
        raise ValueError(
            f"batch={batch} cannot be shared equally by {processes} process(es) x accumulate={accumulate} in "
            f"chunks of {chunk} rows: it must be a multiple of {share}. Say both, "
            f"batch={fits} with chunk={chunk}{smaller}"
        )
