"""Memory of the CPU that a frozen base takes while it is loaded: whole and then packed, or packed as it is read.

    MALLOC_MMAP_THRESHOLD_=262144 python benchmarks/host_memory.py      # host-memory.json (or --out FILE)

A row a base (student.lora.base), of a twin of SD3's transformer with random weights, kept in bfloat16 in one file: the
bytes of the file, those that are kept, and the peak of a process above what it had before it began to load. On Linux.
The variable has the C library give weights of a megabyte back to the system, as it does with those of large models.
"""

import multiprocessing
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import record
import torch

from fewstep.common.console import markdown
from fewstep.models.diffusers_pipeline import load_field
from fewstep.networks.frozen_base import check_base, keep_base

BASES = ("bfloat16", "int8", "nf4")
MODEL: dict[str, Any] = {
    "num_attention_heads": 8, "attention_head_dim": 64, "num_layers": 8, "in_channels": 4, "out_channels": 4,
    "sample_size": 32, "joint_attention_dim": 256, "caption_projection_dim": 512, "pooled_projection_dim": 256,
    "pos_embed_max_size": 32,
}  # fmt: skip


def resident(name: str) -> float:
    """What the system says of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def measure(folder: Path, base: str, is_whole: bool, answer: Connection) -> None:
    """Load in this process; send MiB of what is kept, and the peak on the way."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
    before = resident("VmRSS")
    network = load_field(folder, base="float32" if is_whole else base).network.requires_grad_(False)
    keep_base(base, network)
    answer.send((sum(p.nbytes for p in network.parameters()) / 2**20, resident("VmHWM") - before))


def make(folder: Path, **options: Any) -> None:
    torch.manual_seed(0)
    diffusers.SD3Transformer2DModel(**{**MODEL, **options}).to(torch.bfloat16).save_pretrained(folder)
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder)


def main(argv: list[str]) -> None:
    torch.set_num_threads(1)
    flags = {flag.removeprefix("--"): value for flag, value in zip(argv[::2], argv[1::2], strict=True)}
    fork, rows = multiprocessing.get_context("fork"), []
    with TemporaryDirectory() as place:
        folder, tiny = Path(place, "model"), Path(place, "tiny")
        make(tiny, num_layers=1, num_attention_heads=1, caption_projection_dim=64)
        child = fork.Process(target=make, args=(folder,))  # by itself, as what it frees would be had again
        child.start()
        child.join()
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**20
        for base in BASES:
            check_base(base)
            keep_base(base, load_field(tiny, base=base).network)  # what it imports is no part of what is measured
            found = []
            for is_whole in (True, False):
                ours, theirs = fork.Pipe()
                child = fork.Process(target=measure, args=(folder, base, is_whole, theirs))
                child.start()
                found.append(ours.recv())
                child.join()
            rows.append([base, *(f"{value:.0f}" for value in (size, found[0][0], found[0][1], found[1][1]))])
            print(rows[-1], file=sys.stderr, flush=True)
    columns = ["base", "file", "kept", "peak, whole first", "peak, as it is read"]
    print(markdown(columns, rows))
    note = "MiB; peaks are of resident memory above what the process had before it began. One run each."
    threshold = os.environ.get("MALLOC_MMAP_THRESHOLD_", "not set")
    record.write(
        Path(flags.pop("out", "host-memory.json")),
        title="Memory of the CPU while a frozen base is loaded",
        columns=columns,
        rows=rows,
        **record.here(seeds=[0], notes=[note, f"MALLOC_MMAP_THRESHOLD_: {threshold}."]),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
