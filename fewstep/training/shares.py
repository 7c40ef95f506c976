"""How the rows of a batch are shared out: in whole chunks, to processes and micro-batches. Nothing heavy is imported
here, so that a recipe is refused before anything is."""

_CHUNK = 64


def default_chunk(batch: int) -> int:
    """The largest divisor of ``batch`` up to 64: from the batch alone, never from the number of processes."""
    return max(size for size in range(1, min(batch, _CHUNK) + 1) if batch % size == 0)


def check_shares(batch: int, chunk: int, accumulate: int = 1, processes: int = 1) -> None:
    """Raise ValueError where a batch cannot be shared out in whole chunks; names one that can."""
    share = chunk * processes * accumulate
    if batch % share:
        fits = max(1, round(batch / share)) * share
        raise ValueError(
            f"batch={batch} cannot be shared equally by {processes} process(es) x accumulate={accumulate} in "
            f"chunks of {chunk} rows: it must be a multiple of {share}. Use batch={fits} with chunk={chunk}, or a "
            "smaller chunk"
        )
