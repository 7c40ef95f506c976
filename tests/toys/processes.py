"""Processes as their users start them, one or several, with this checkout and its toys on the way."""

import os
import subprocess
import sys
from pathlib import Path

from toys.places import ROOT, TESTS


def environment(**more: str) -> dict[str, str]:
    """That of such a process: one thread, no GPU."""
    path = os.pathsep.join([str(TESTS), str(ROOT)])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", **more}


def torchrun(
    *words: str | Path, processes: int = 2, timeout: float = 600, cwd: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    """What torchrun makes of a script, or of ``-m MODULE``, and its arguments; it has to end well."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*launch, *map(str, words)], env=environment(), cwd=cwd, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done
