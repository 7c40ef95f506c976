"""One process or several, started by torchrun, ``accelerate launch`` or SLURM, on torch.distributed itself."""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

_PATIENCE = timedelta(seconds=5)  # with processes that may have died


@dataclass(frozen=True)
class World:
    """This process among the processes of a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and draws the progress bar."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            dist.barrier()

    def sum(self, values: list[float]) -> list[float]:
        """The sums over processes, in float64."""
        if self.size == 1:
            return values
        # A CPU tensor goes through gloo, so that a GPU that is still computing is not waited for.
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def from_main(self, value: int) -> int:
        """The value that the main process has, in every process."""
        return int(self.sum([float(value) if self.is_main else 0.0])[0])

    def check_same(self, step: int, out: object) -> None:
        """Raise if the processes would go on from different steps."""
        if self.sum([float(step)])[0] != step * self.size:
            raise ValueError(
                f"the processes see different checkpoints in {out} (process {self.rank}: step {step}): use a folder "
                "that all machines share"
            )

    def agree(self, seconds: float, stop: bool) -> tuple[float, bool]:
        """The main process's clock, and whether any process was asked to stop: the same answer everywhere."""
        if self.size == 1:
            return seconds, stop
        clock, asked = self.sum([seconds if self.is_main else 0.0, float(stop)])
        return clock, asked > 0


def environment() -> World:
    """Where the launcher put this process: RANK, WORLD_SIZE and LOCAL_RANK, or SLURM's where MASTER_ADDR is set."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return World(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0")))
    # Without MASTER_ADDR these only say that a SLURM job is around us: waiting for the others would be for ever.
    if "SLURM_PROCID" in env and "MASTER_ADDR" in env:
        return World(int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_LOCALID", "0")))
    return World()


def choose_device(device: torch.device | str | None, world: World) -> torch.device:
    """The device asked for, else this process's GPU, else the CPU.

    Raises:
        ValueError: it is not here.
    """
    asked = device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", world.local_rank)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # an assertion where torch was built without it
        known = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
        reason = str(error).strip().splitlines()[0].split(". ")[0][:120]
        raise ValueError(f"the device {str(asked)!r} cannot be used: there is {known} ({reason})") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@contextmanager
def join(world: World, device: torch.device) -> Iterator[None]:
    """The process group of a run, made where there is none yet and kept until the process ends.

    Not until the run ends: a second group made at the same address may find what the first left there, and hang.
    """
    if world.size > 1 and not dist.is_initialized():
        os.environ.setdefault("MASTER_PORT", "29500")
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=world.rank, world_size=world.size)
        atexit.register(_leave)
    try:
        yield
        world.barrier()  # the main process has written its last file
    except BaseException:
        atexit.unregister(_leave)  # the others may never come
        atexit.register(_drop)
        raise


def _leave() -> None:
    """Without a barrier before the end, some processes abort while others still talk to them."""
    dist.barrier()
    dist.destroy_process_group()


def _drop() -> None:
    """After an error: the others may have it too, and then all leave together, or may be gone."""
    if dist.is_initialized():
        with suppress(RuntimeError, ValueError):
            dist.monitored_barrier(timeout=_PATIENCE)
        dist.destroy_process_group()
