"""One process or several, started by torchrun, ``accelerate launch`` or SLURM, on torch.distributed itself."""

import atexit
import importlib
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread, Timer
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from fewstep.common.errors import TrainingError, briefly, shortened

Made = TypeVar("Made")
_SILENT = 10.0  # seconds of waiting before a word is said
_PATIENCE = 5.0  # seconds, with processes that may have died
_ALONE: ContextVar[bool] = ContextVar("alone", default=False)
_TOGETHER: ContextVar[bool] = ContextVar("together", default=False)
_STORES: list[dist.Store] = []  # of the group that was made here


class LostProcessError(TrainingError):
    """The processes of a run are not all there."""

    follows = 5.0  # seconds, at least, after what ended the others


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

    def gather(self, value: Any) -> list[Any]:
        """What every process has, in the order of their ranks, in every process."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

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


def summed(values: Tensor) -> Tensor:
    """The sums of some numbers over processes, on their device: the same everywhere. Inside :func:`alone`, and where
    there is one process, the numbers themselves."""
    if _ALONE.get() or not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


def anywhere(flag: Tensor) -> bool:
    """Whether a flag is up, in any process where they call networks :func:`together`: what one calls then, all call."""
    return bool(summed(flag.to(torch.int32)) if _TOGETHER.get() else flag)


@contextmanager
def together() -> Iterator[None]:
    """Inside, networks are sharded, and no process can call one without the others."""
    token = _TOGETHER.set(True)
    try:
        yield
    finally:
        _TOGETHER.reset(token)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, a process talks to no other: what it tries is its own, and may be tried more often than elsewhere."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


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
def join(world: World, device: torch.device, group: bool = False) -> Iterator[None]:
    """The process group of a run, made where there is none yet and kept until the process ends.

    Args:
        group: make one for a single process too.

    Not until the run ends: a second group made at the same address may find what the first left there, and hang.

    Raises:
        LostProcessError: the others do not come in time, or one of them has ended.
    """
    if (world.size > 1 or group) and not dist.is_initialized():
        # Its functions keep the group that there is when it is imported, and with it threads of gloo beyond the end of
        # the group: one that lets go of a tensor while Python ends aborts the process.
        importlib.import_module("torch.distributed.nn.functional")
        if world.size > 1:
            _meet(world, device)
        else:
            dist.init_process_group(_backend(device), store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(_leave)
    try:
        yield
        world.barrier()  # the main process has written its last file
    except BaseException as error:
        atexit.unregister(_leave)  # the others may never come
        why = _of_the_others(error) if isinstance(error, RuntimeError) and world.size > 1 else None
        is_lost = isinstance(error, LostProcessError) or why is not None
        atexit.register(_drop, is_lost)
        if why is not None and not isinstance(error, LostProcessError):
            raise LostProcessError(
                f"process {world.rank} of {world.size}: another process of this run has ended, or cannot be reached "
                f"({why}). Start all of them again, by the same command: it goes on with what was saved"
            ) from error
        raise


def _meet(world: World, device: torch.device) -> None:
    """Wait for the other processes, no longer than $FEWSTEP_PATIENCE seconds, and make the group of all."""
    where = [os.environ.setdefault("MASTER_ADDR", "127.0.0.1"), os.environ.setdefault("MASTER_PORT", "29500")]
    patience, place = _longest_wait(), ":".join(where)
    who = f"process {world.rank} of {world.size}"
    note = Timer(_SILENT, lambda: print(f"{who} waits for the others at {place}", file=sys.stderr, flush=True))
    note.daemon = True
    note.start()
    try:
        if not world.is_main:
            _reach(where[0], int(where[1]), patience.total_seconds())
        store = _waited(lambda: _gathering(world, patience))
        _STORES.append(store)
        dist.init_process_group(_backend(device), store=store, rank=world.rank, world_size=world.size)
    except (RuntimeError, OSError) as error:
        raise LostProcessError(
            f"{who}: not all came to {place} within {patience.total_seconds():g} seconds ({briefly(error)}). "
            "torchrun starts all; for one alone, unset RANK and WORLD_SIZE; FEWSTEP_PATIENCE=SECONDS waits longer"
        ) from error
    finally:
        note.cancel()


def _gathering(world: World, patience: timedelta) -> dist.Store:
    """The store of all processes, once they are there."""
    store, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=patience))
    # torchrun that starts them again (--max-restarts) may keep the store, and in it where those before were.
    store = dist.PrefixStore(f"fewstep/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    store.set(f"{world.rank}", "here")
    store.wait([f"{rank}" for rank in range(world.size)], patience)
    return store


def _waited(wait: Callable[[], Made]) -> Made:
    """What a function of torch's gives that waits: aside, as no signal would be heard here until it ends."""
    found: list[Made] = []
    raised: list[Exception] = []

    def work() -> None:
        try:
            found.append(wait())
        except Exception as error:
            raised.append(error)

    thread = Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if raised:
        raise raised[0]
    return found[0]


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _longest_wait() -> timedelta:
    """How long others are waited for.

    Raises:
        ValueError: $FEWSTEP_PATIENCE is no number of seconds.
    """
    said = os.environ.get("FEWSTEP_PATIENCE") or "600"
    try:
        patience = timedelta(seconds=float(said))
    except (ValueError, OverflowError):
        patience = timedelta()
    if patience <= timedelta():
        raise ValueError(f"FEWSTEP_PATIENCE is {said!r}, and has to be a number of seconds, such as 600")
    return patience


def _reach(host: str, port: int, seconds: float) -> None:
    """Wait until the main process listens: torch would fill the terminal with the frames of its code meanwhile."""
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, end - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def _of_the_others(error: RuntimeError) -> str | None:
    """What an error of talking to the other processes says; None for any other."""
    said = " ".join(str(error).split())
    if not isinstance(error, dist.DistError) and not re.search(r"gloo|NCCL|[Cc]onnection (closed|reset)", said):
        return None
    return shortened(re.sub(r"^\[[^\]]*\] ?", "", said).split(". ")[0], 90)


def _leave() -> None:
    """Without a barrier before the end, some processes abort while others still talk to them."""
    with suppress(RuntimeError):  # of those that were killed in the meantime
        dist.barrier()
    dist.destroy_process_group()


def _drop(is_lost: bool) -> None:
    """After an error. The others may have it too, and then all leave together; or they wait for what never comes until
    this one leaves (a barrier of torch would have no end then, whatever its timeout); or they are lost already."""
    if not dist.is_initialized():
        return
    with suppress(RuntimeError):
        for store in [] if is_lost else _STORES:
            store.set(f"left/{dist.get_rank()}", "left")
            names = [f"left/{rank}" for rank in range(dist.get_world_size())]
            end = time.monotonic() + _PATIENCE
            while not store.check(names) and time.monotonic() < end:  # a wait of torch's would fill the terminal
                time.sleep(0.1)
            time.sleep(0.0 if dist.get_rank() else 0.3)  # the main process has the store
    dist.destroy_process_group()
