"""Encoding for a model that is named: of a diffusers folder, its VAE and text encoders alone are loaded."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fewstep.common.distributed import World, choose_device
from fewstep.common.model_files import class_of, read_json
from fewstep.common.on_ray import check_engine, on_ray
from fewstep.data.captions import Captioned
from fewstep.flows.signature import Model
from fewstep.generation import encoding
from fewstep.generation.encoding import Progress
from fewstep.generation.texts import turns_of
from fewstep.models.weightless import field_without_weights
from fewstep.runs.loading import find_model


def encoders_of(source: str | Path, variant: str | None = None) -> Model:
    """A model for its VAE, its text encoders, its classes and the size of its samples alone: of a diffusers folder, the
    weights of the network are not read.

    Args:
        variant: of their weights, as for ``fewstep.load``.

    Raises:
        FileNotFoundError, ValueError: as ``fewstep.load``.
    """
    import diffusers

    folder = Path(source).expanduser()
    is_pipeline = hasattr(diffusers, class_of(read_json(folder / "model_index.json")))
    if is_pipeline:
        return field_without_weights(folder, variant)
    return find_model(str(source), {"variant": variant} if variant else None)


def encode(
    model: Model | str | Path,
    data: str | Path | Captioned,
    out: str | Path,
    *,
    size: int | None = None,
    dtype: str = "float16",
    batch: int = 16,
    shard: int | None = None,
    on_error: str = "raise",
    device: torch.device | str | None = None,
    command: str = "fewstep.encode with the same arguments",
    progress: Progress | None = None,
    rest: bool = False,
    buckets: bool = False,
    bucket_step: int | None = None,
    small: str = "enlarge",
    variant: str | None = None,
    engine: str = "processes",
    workers: int | None = None,
    **options: Any,
) -> int:
    """Encode images and their captions for a latent model, once, into the folder ``out``; returns how many shards are
    still missing.

    Shards that are there with the hash that they were written with stay, so a call that was stopped, repeated, goes on.
    Under torchrun or SLURM the processes share out the shards, with no word between them: what is missing at the end
    is still on its way in another process. Each distinct caption is encoded once; latents are the means of the VAE's
    posterior.

    Args:
        model: what they are encoded for, a model with ``latents`` (and ``text``), or its name: of a diffusers folder
            only VAE and text encoders are loaded.
        data: a folder of images, ``hf:NAME``, webdataset shards: see ``fewstep.data.captions``.
        out: the folder of ``encoded.json``, ``index.json`` and the shards; each file is whole or absent.
        size: side of the images in pixels: the middle square is cut out and resized. By default that of the model.
        dtype: how latents and embeddings are kept: float16, bfloat16 or float32.
        batch: images and captions encoded at once.
        shard: images in a file; by default about 256 MB.
        on_error: what an image that cannot be read does, or a row without caption: raise, or skip.
        device: the default is the process's GPU if there is one, else the CPU.
        command: what to type to go on, told where a shard is missing.
        progress: called with the images and captions done and all those of this process.
        buckets: keep the shapes of images: each is cut to the nearest of some sizes of about the area of the square of
            ``size``, and each size is a bucket of the folder (``fewstep.data.aspects``). SDXL and PixArt are told the
            size and the crop of each image.
        bucket_step: of what the sides of buckets are multiples; by default of what the model takes, and not much finer
            than a sixteenth of ``size``.
        small: what becomes of an image smaller than its bucket: enlarge, or drop.
        rest: afterwards, make what the other processes have not made yet.
        variant: of the weights of a model that is named.
        engine: who makes the shards: processes, this one or those that were started together; or ray, the workers of
            the cluster of $RAY_ADDRESS, else of this machine (extra ``scale``). They see the model, the data and
            ``out`` by the same paths.
        workers: of Ray; by default one a GPU, or one a machine where there are none.
        options: of the kind of data (``caption``, ``image``, ``split``, ...).

    Raises:
        FileNotFoundError: no such data. ValueError: arguments that cannot be, a folder of other data or of another
            model, or of something else; an image that cannot be read; numbers that the dtype cannot hold.

    >>> encode("./stable-diffusion", "./photos", "encoded", size=512)
    >>> fit(student, ITVM(teacher), load_data("encoded"), steps=20_000)
    """
    check_engine(engine, workers)
    opened = _opened(model, variant)
    how: dict[str, Any] = {"size": size, "dtype": dtype, "batch": batch, "shard": shard, "on_error": on_error}
    how |= {"command": command, "buckets": buckets, "bucket_step": bucket_step, "small": small, **options}
    if engine == "processes":
        return encoding.encode(opened, data, out, device=device, progress=progress, rest=rest, **how)
    work = encoding.begin(opened, data, out, place=torch.device("cpu"), **how)
    out = Path(out).expanduser().resolve()
    make, done = partial(_maker, model, variant, data, out, device, how), 0
    shares = [
        (kind, i, _TEXTS) for kind, count in (("texts", _TEXTS), ("latents", len(work.latents))) for i in range(count)
    ]
    for count in on_ray(shares, make, workers=workers, on_cpu=torch.device(device or "cuda").type == "cpu"):
        done += count
        if progress is not None:
            progress(done, work.size)
    if missing := work.finish():
        raise ValueError(
            f"{missing} shards are not in {out}, which the workers wrote: use a folder that all machines share"
        )
    return 0


_TEXTS = 16  # shares of the captions


def _opened(model: Model | str | Path, variant: str | None) -> Model:
    return encoders_of(model, variant) if isinstance(model, str | Path) else model


def _maker(
    model: Model | str | Path,
    variant: str | None,
    data: str | Path | Captioned,
    out: Path,
    device: torch.device | str | None,
    how: dict[str, Any],
) -> Callable[[tuple[str, int, int]], int]:
    """What makes a share of the shards in a worker, and says how many images and captions are done."""
    work = encoding.begin(_opened(model, variant), data, out, place=choose_device(device, World()), **how)

    def make(share: tuple[str, int, int]) -> int:
        kind, number, of = share
        counts: list[int] = []
        if kind == "texts":
            work.write_texts(turns_of(World(number, of), False), counts.append)
        else:
            work.write_latents(lambda _: [number], counts.append)
        return sum(counts)

    return make
