"""What one of the processes of processes.py does: a task is a line of JSON on stdin, and what it found one on stdout.

Processes of a team have RANK and WORLD_SIZE of each other, as torchrun gives them.
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import fewstep
from fewstep import networks
from fewstep.common import distributed
from fewstep.common.shards import local
from fewstep.data.arrays import ArrayData
from fewstep.flows.fields import NetworkField
from fewstep.flows.paths import Linear, VariancePreserving

# Depth, heads, their width, and the rows of an update.
TWINS = {"small": (4, 4, 32, 32), "larger": (6, 4, 64, 16)}
SIDE, IMAGES = 64, 192  # of what is encoded


def dit(twin: str) -> Any:
    from diffusers import DiTTransformer2DModel

    layers, heads, width, _ = TWINS[twin]
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width, in_channels=4, out_channels=4, num_layers=layers,
        sample_size=16, patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip


def field_of(twin: str) -> NetworkField:
    return NetworkField(networks.DiT(dit(twin)), VariancePreserving(), "noise", path=Linear())


def rows_of(twin: str) -> ArrayData:
    return ArrayData(torch.randn(256, 4, 16, 16), {"class_labels": torch.arange(256) % 10})


def rate(stamps: list[float], rows: int) -> float:
    """Rows a second, of the median step; the first two warm up."""
    return rows / statistics.median(b - a for a, b in pairwise(stamps[1:]))


def fit(twin: str, method: str, steps: int, shard: str | None = None, rows: int | None = None) -> dict[str, Any]:
    """Rows a second of ``fewstep.fit``, all processes together."""
    teacher, rows, stamps = field_of(twin), rows or TWINS[twin][-1], []
    student = fewstep.FlowMap.from_field(teacher) if method == "ITVM" else teacher
    objective = fewstep.ITVM(teacher) if method == "ITVM" else fewstep.FlowMatching()
    fewstep.fit(
        student, objective, rows_of(twin), steps, batch=rows, chunk=rows // 4, quiet=True, device="cpu", shard=shard,
        callbacks=[lambda run: stamps.append(time.perf_counter())],
    )  # fmt: skip
    return {"rows": rate(stamps, rows) if stamps else None}


def plain(twin: str, steps: int, share: int = 1, together: bool = False) -> dict[str, Any]:
    """Rows a second of this process alone, in a loop of flow matching that a script would have: torch and nothing else.

    Args:
        share: the rows of an update are shared out to so many processes. together: by torch's DDP.
    """
    net: Any = field_of(twin).network
    net.requires_grad_(True)
    data, rows = rows_of(twin), TWINS[twin][-1] // share
    model = torch.nn.parallel.DistributedDataParallel(net, find_unused_parameters=True) if together else net
    optimizer, stamps = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True), []
    for _ in range(steps):
        batch = data.rows(torch.randint(256, (rows,)), torch.Generator())
        noise, t = torch.randn_like(batch.data), torch.rand(rows)
        x = noise + t[:, None, None, None] * (batch.data - noise)
        (model(x, t, **batch.cond) - (batch.data - noise)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        stamps.append(time.perf_counter())
    return {"rows": rate(stamps, rows)}


def pipeline(folder: str) -> dict[str, Any]:
    """A pipeline of a DiT with a VAE, and photographs in two folders."""
    import numpy as np
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
    from PIL import Image

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=8, sample_size=SIDE, latent_channels=4,
    )  # fmt: skip
    DiTPipeline(dit("small"), vae, DDIMScheduler(), {0: "a", 1: "b"}).save_pretrained(f"{folder}/pipeline")
    draw = np.random.default_rng(0)
    for i in range(IMAGES):
        place = Path(folder, "photos", "ab"[i % 2], f"{i}.jpg")
        place.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(place)
    return {}


def encode(folder: str, out: str, batch: int) -> dict[str, Any]:
    """Seconds of ``fewstep.encode``: from the files of a model and of images to a folder of shards."""
    begun = time.perf_counter()
    fewstep.encode(f"{folder}/pipeline", f"{folder}/photos", out, size=SIDE, batch=batch, device="cpu")
    return {"seconds": time.perf_counter() - begun}


@torch.no_grad()
def encode_bare(folder: str, batch: int, is_read: bool) -> dict[str, Any]:
    """Seconds of a loop over the VAE: of pixels that are in memory, or with a line before it that reads them."""
    import numpy as np
    from diffusers import AutoencoderKL
    from PIL import Image, ImageOps

    vae: Any = AutoencoderKL.from_pretrained(f"{folder}/pipeline", subfolder="vae")
    files = sorted(Path(folder, "photos").rglob("*.jpg"))

    def read(some: list[Path]) -> torch.Tensor:
        size, by = (SIDE, SIDE), Image.Resampling.LANCZOS
        images = [ImageOps.fit(Image.open(file).convert("RGB"), size, by) for file in some]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1

    parts = [files[i : i + batch] for i in range(0, len(files), batch)]
    pixels = [read(part) for part in parts] if not is_read else [torch.empty(0)] * len(parts)
    begun = time.perf_counter()
    for part, known in zip(parts, pixels, strict=True):
        vae.encode(read(part) if is_read else known).latent_dist.mode()
    return {"seconds": time.perf_counter() - begun}


def sample(out: str, count: int) -> dict[str, Any]:
    """Seconds of ``fewstep sample``, without what Python imports: twenty steps of the teacher that comes along."""
    from fewstep.cli import main

    begun = time.perf_counter()
    words = ["sample", "fewstep:fashion-mnist", "--steps", "20", "--count", f"{count}", "--batch", "16"]
    assert main([*words, "--device", "cpu", "--out", out]) == 0
    return {"seconds": time.perf_counter() - begun}


def kept(steps: int = 2) -> dict[str, Any]:
    """Bytes of all tensors that live in this process before an update, and what is planned for so many processes: of
    a twin of Flux that is trained by ITVM."""
    from families import FAMILIES

    from fewstep.planning.shards import Calls, Shards
    from fewstep.training import fit as fitting
    from fewstep.training.ema import Ema
    from fewstep.training.sharding import networks_of
    from fewstep.training.step import players_of

    family = FAMILIES["FluxTransformer2DModel"]
    before, found, update = alive(), [], fitting.update

    def watched(*args: Any) -> Any:
        found.append(alive() - before)
        return update(*args)

    def parts() -> tuple[Any, Any]:
        teacher = family.field()
        return fewstep.FlowMap.from_field(teacher), fewstep.ITVM(teacher)

    rows = family.batch()
    data: Any = ArrayData(rows.data[:16], {name: value[:16] for name, value in rows.cond.items()})
    before, fitting.update = alive(), watched
    fewstep.fit(*parts(), data, steps, batch=16, chunk=4, quiet=True, device="cpu", shard="fsdp2")
    fitting.update = update

    student, objective = parts()
    objective.adopt(student.train())
    average, target = Ema(student, 0.999).module, Ema(student, objective.ema).module
    networks_ = networks_of(student, objective, [average, target])
    trained = [p for player in players_of(objective, student).values() for p in player.parameters]
    holders = {"trained": trained, "student": student, "teacher": objective.teacher, "objective": objective}
    holders |= {"average": average, "target": target}
    shards = Shards.of(networks_, dict.fromkeys(networks_, Calls()), None, False, holders)
    return {"kept": found[-1], "planned": shards.fixed(distributed.environment().size)}


def alive() -> int:
    """Bytes of the memory behind all tensors of this process, each counted once."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            storage = local(thing).untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "fit": fit, "plain": plain, "pipeline": pipeline, "encode": encode, "encode_bare": encode_bare, "sample": sample,
    "kept": kept,
}  # fmt: skip


def main() -> None:
    import warnings

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    world, replies = distributed.environment(), sys.stdout
    with redirect_stdout(sys.stderr), distributed.join(world, torch.device("cpu")):
        for line in sys.stdin:
            task = json.loads(line)
            world.barrier()
            found = TASKS[task.pop("do")](**task)
            print(json.dumps(found), file=replies, flush=True)


if __name__ == "__main__":
    main()
