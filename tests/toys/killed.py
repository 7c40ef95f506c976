"""Sharded processes that can be killed: forked from one that has imported all there is to import, so that a start takes
a second and not ten."""

import atexit
import multiprocessing
import os
import socket
import sys
import traceback
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from toys.places import ROOT, TESTS
from toys.sharded import train


def training(folder: Path, steps: int, place: dict[str, str]) -> None:
    """Train as one process of several; its step is in a file, and what it says in another."""
    said = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ.update(place)
    code = 0

    def tick(run: Any) -> None:
        (folder / f"step-{place['RANK']}").write_text(str(run.step))

    try:
        options: dict[str, Any] = {"steps": steps, "checkpoint_every": 3, "callbacks": [tick]}
        train("dit", "ITVM", folder / "run", dtype=torch.float32, shard="fsdp2", **options)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()  # which multiprocessing leaves out
    sys.stderr.flush()
    os._exit(code)


@cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    loaded = [
        "toys.killed",
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint",
        "torch.distributed.nn.functional",
    ]
    context.set_forkserver_preload(loaded)
    return context


def both(folder: Path, steps: int) -> list[BaseProcess]:
    """Two processes that train together, started."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    path = os.pathsep.join([str(TESTS), str(ROOT)])
    said = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    before = {name: os.environ.get(name) for name in said}
    os.environ.update(said)  # of the one that is forked, when it starts
    try:
        started = []
        for rank in ("0", "1"):
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": rank}
            started.append(_context().Process(target=training, args=(folder, steps, place), daemon=True))
            started[-1].start()
        return started
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
