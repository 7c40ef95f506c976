"""Work shared out by Ray Data to the workers of a Ray cluster: the optional engine of ``encode`` and ``sample``."""

import logging
import os
import pickle
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

from fewstep.common.distributed import environment
from fewstep.common.errors import TrainingError, briefly, shown, unknown
from fewstep.common.trust import trusting

ENGINES = ("processes", "ray")
Item = TypeVar("Item")
Made = TypeVar("Made")
_STORE = 1 << 29  # bytes of the object store of a cluster that is started here; larger objects go to the disk
_AGAIN = 4  # times that a worker which died is started again: one that dies of its work would never end
_REACH = 10.0  # seconds


def check_engine(engine: str, workers: int | None = None) -> None:
    """That an engine can be had.

    Raises:
        ValueError: an unknown one, workers of another than Ray, Ray within processes that share the work already, a
            $RAY_ADDRESS at which nobody listens.
        ImportError: Ray is not installed.
    """
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    if workers is not None and (engine != "ray" or workers < 1):
        raise ValueError(f"workers is {workers}: a number of 1 or more, and of engine ray (torchrun starts others)")
    if engine == "processes":
        return
    if environment().size > 1:
        raise ValueError("engine ray shares out the work itself: start one process, without torchrun")
    if find_spec("ray") is None:
        raise ImportError("engine ray needs Ray, which is not installed: pip install 'fewstep[scale]'")
    _reach(os.environ.get("RAY_ADDRESS", ""))


def on_ray(
    items: Sequence[Item],
    make: Callable[[], Callable[[Item], Made]],
    *,
    workers: int | None = None,
    on_cpu: bool = False,
) -> Iterator[Made]:
    """What is made of each item, as they are done, in any order.

    Each worker calls ``make`` once, and what that gives for one item after the other. A worker that dies is started
    again, up to four times, and its item is made once more. The cluster is that of $RAY_ADDRESS, else one that is
    started on this machine for as long as it takes.

    Args:
        make: can be pickled; works in the folder of this process, where the workers' machines have it.
        workers: by default one a GPU, or one a machine where there are none.
        on_cpu: leave GPUs alone.

    Raises:
        ValueError: what a worker raised, an address that cannot be reached, more workers than there is room for.
        TrainingError: a worker dies of its work.
    """
    if not items:
        return
    # Ray tells of workers that died on stdout, which is for results.
    with redirect_stdout(sys.stderr), _cluster() as ray:
        count, needs = _room(ray, workers, on_cpu)
        rows = ray.data.from_items([{"item": pickle.dumps(item)} for item in items], override_num_blocks=len(items))
        with warnings.catch_warnings():  # Ray 2.64 takes no bound on what is tried again: the extra stays below it
            warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
            done = rows.map_batches(
                _Worker,
                fn_constructor_args=(make, os.getcwd()),
                batch_size=1,
                concurrency=min(count, len(items)),
                max_restarts=_AGAIN,
                max_task_retries=_AGAIN,
                **needs,
            )
        try:
            for row in done.iter_rows():
                made, refusal = pickle.loads(row["made"])
                if refusal is not None:
                    kind, said = refusal
                    raise kind(said)
                yield made
        except ray.exceptions.RayError as error:
            raise TrainingError(
                f"a worker of the Ray cluster failed ({briefly(error)}): what is done stays, the same command goes on"
            ) from error


class _Worker:
    """One of the cluster's, in a process of its own. What it raises is handed over: Ray would try again for ever."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]], folder: str) -> None:
        self.refusal = None
        try:
            os.chdir(folder)
            with trusting():  # what runs code here has been opened, and allowed to, by the process that asks
                self.work = make()
        except _REFUSALS as error:
            self.refusal = _said(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        made, refusal = None, self.refusal
        if refusal is None:
            try:
                with trusting():
                    made = self.work(pickle.loads(batch["item"][0]))
            except _REFUSALS as error:
                refusal = _said(error)
        return {"made": [pickle.dumps((made, refusal))]}


_REFUSALS = (ValueError, OSError, ImportError, TrainingError)


def _said(error: Exception) -> tuple[type[Exception], str]:
    """An error as it goes from process to process: some of ours cannot be pickled."""
    return (TrainingError if isinstance(error, TrainingError) else ValueError), str(error)


@contextmanager
def _cluster() -> Iterator[Any]:
    """Ray, connected: as the caller has it, to $RAY_ADDRESS, or to a cluster of this machine for the while."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what fails is said by the error
    ray: Any = import_module("ray")
    import_module("ray.data")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get("RAY_ADDRESS", "")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
    if address in ("", "local"):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", include_dashboard=False, object_store_memory=_STORE, **quiet)
    else:
        try:
            ray.init(address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise _unreachable(address, error) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """That somebody listens there: Ray itself would try for minutes."""
    host, has_port, port = address.rpartition("://")[2].rpartition(":")
    if not has_port or not port.isdigit():
        return  # none, auto, local
    try:
        socket.create_connection((host, int(port)), timeout=_REACH).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> ValueError:
    return ValueError(
        f"RAY_ADDRESS is {shown(address)}, and no Ray cluster can be reached there ({briefly(error)}): `ray start "
        "--head` starts one, and without RAY_ADDRESS this machine alone does the work"
    )


def _room(ray: Any, workers: int | None, on_cpu: bool) -> tuple[int, dict[str, float]]:
    """How many workers there are, and what Ray keeps for each."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    gpus = 0 if on_cpu else int(sum(node.get("GPU", 0) for node in nodes))
    most = gpus or int(sum(node["CPU"] for node in nodes))
    count = workers or gpus or len(nodes)
    if count > most or not count:
        raise ValueError(f"{count} workers, and the Ray cluster has room for {most}: one a {'GPU' if gpus else 'CPU'}")
    if gpus:
        return count, {"num_cpus": 1, "num_gpus": 1}
    cpus = int(min(node["CPU"] for node in nodes)) // -(-count // len(nodes))
    return count, {"num_cpus": max(1, cpus), "num_gpus": 0}
