"""Images and captions as what a latent model trains on: latents and text embeddings, computed once, in shards.

``fewstep.data.encoded`` reads what is written here.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.common.distributed import choose_device, environment
from fewstep.common.errors import unknown
from fewstep.common.user_folders import cache_folder
from fewstep.data.captions import Captioned, Rows
from fewstep.data.decode import check_side, unreadable
from fewstep.data.encoded import FACTS, FORMAT, INDEX, Encoded, read_facts
from fewstep.data.images import check_buckets
from fewstep.data.pairs import Pairs
from fewstep.data.sources import listed
from fewstep.flows.signature import Model, classes_of, shape_of
from fewstep.generation.bucketing import Part, buckets_for, in_buckets
from fewstep.generation.encoded_shards import Encoding
from fewstep.generation.texts import DTYPES, claim, refuse_others, rows_of, turns_of
from fewstep.latents.encoders import text_identity, vae_identity

Progress = Callable[[int, int], None]
_KIND = "encoded data"


def encode(
    model: Model,
    data: str | Path | Captioned,
    out: str | Path,
    *,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    rest: bool = False,
    **how: Any,
) -> int:
    """As ``fewstep.encode``, for a model that is open; ``how`` is what :func:`begin` takes."""
    place, world = choose_device(device, environment()), environment()
    work = begin(model, data, out, place=place, **how)
    total, done = -(-work.size // (1 if rest else world.size)), 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(min(done, total), total)

    work.write_texts(turns_of(world, rest), tick)
    work.write_latents(turns_of(world, rest), tick)
    return work.finish()


def begin(
    model: Model,
    data: str | Path | Captioned,
    out: str | Path,
    *,
    place: torch.device,
    size: int | None = None,
    dtype: str = "float16",
    batch: int = 16,
    shard: int | None = None,
    on_error: str = "raise",
    command: str = "fewstep.encode with the same arguments",
    buckets: bool = False,
    bucket_step: int | None = None,
    small: str = "enlarge",
    **options: Any,
) -> Encoding:
    """Claim the folder ``out`` for data that are to be encoded; the arguments, and what is refused, are those of
    ``fewstep.encode``. Every process does: they write the same bytes."""
    for name, value in (("batch", batch), ("shard", shard)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be at least 1, got {value!r}")
    source = data if isinstance(data, Captioned) else listed(data, model.text is not None, **options)
    out = Path(out).expanduser()
    facts = settings(model, source, size, dtype, on_error, buckets, bucket_step, small)
    if (out / FACTS).is_file():
        refuse_others(out, facts, _KIND, read_facts(out))
    rows = source.rows
    columns, captions = _columns(model, rows, source.name)
    if rows.problems and on_error == "raise":
        row = next(iter(rows.problems))
        raise unreadable(rows.names[row], rows.problems[row])
    parts = [Part(range(len(rows)), (facts["size"], facts["size"]), tuple(facts["shape"]))]
    if buckets:
        parts, columns["cut"] = in_buckets(model, source, facts)
        facts["buckets"] = [part.described() for part in parts]
    per_shard = shard or rows_of(int(np.prod(facts["shape"])) * DTYPES[dtype].itemsize)
    facts |= {
        "count": len(rows), "shard": per_shard, "captions": len(captions),
        "classes": list(rows.classes) if facts["labels"] else None, "command": command,
    }  # fmt: skip
    claim(out / FACTS, facts, _KIND, read_facts)
    return Encoding(model, source, out, facts, columns, captions, parts, batch, place)


def encoded_once(
    model: Model,
    data: str | Path,
    *,
    size: int | None = None,
    dtype: str = "float16",
    on_error: str = "raise",
    encode_batch: int = 16,
    progress: Progress | None = None,
    buckets: bool = False,
    bucket_step: int | None = None,
    small: str = "enlarge",
    **options: Any,
) -> Encoded:
    """Data of images encoded for a model, from the cache ($FEWSTEP_CACHE, else ~/.cache/fewstep), where it is put
    first if it is not there. Several processes share the work, and each sees to it that all of it is done.

    Args:
        encode_batch: images and captions encoded at once; the others as for :func:`encode`.
    """
    source = listed(data, model.text is not None, **options)
    facts = settings(model, source, size, dtype, on_error, buckets, bucket_step, small)
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_folder() / "encoded" / key
    if not (folder / INDEX).is_file():
        how: dict[str, Any] = {"size": size, "dtype": dtype, "on_error": on_error, "batch": encode_batch}
        how |= {"buckets": buckets, "bucket_step": bucket_step, "small": small}
        encode(model, source, folder, **how, rest=True, progress=progress, command=f"a training on {data}")
    return Encoded(folder)


def settings(
    model: Model,
    source: Captioned,
    size: int | None,
    dtype: str,
    on_error: str,
    buckets: bool = False,
    bucket_step: int | None = None,
    small: str = "enlarge",
) -> dict[str, Any]:
    """What makes one folder of encoded data another than the next.

    Raises:
        ValueError: a model of pixels, a size that its VAE does not take, an unknown dtype or on_error.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if on_error not in ("raise", "skip"):
        raise unknown("on_error", on_error, ["raise", "skip"])
    latents, text = model.latents, model.text
    if latents is None:
        raise ValueError("the model works on pixels, it has no VAE: there is nothing to encode, train on the images")
    size = latents.image_shape_of(shape_of(model))[-1] if size is None else size
    check_side(size)
    check_buckets(buckets, size, bucket_step, small)
    # Nothing is said of buckets where there are none: of folders from before there were any, the facts stay the same.
    cut = {"bucket_step": buckets_for(model, size, bucket_step)[0], "small": small} if buckets else {}
    return {
        "format": FORMAT, "data": source.identity, "size": size, "dtype": dtype, "on_error": on_error,
        "shape": list(latents.shape_of((latents.image_channels, size, size))), "vae": vae_identity(latents),
        "text": None if text is None else text_identity(text), "labels": bool(classes_of(model)),
        **cut,
    }  # fmt: skip


def check_model(data: Encoded | Pairs, model: Model, name: str) -> None:
    """That a folder was encoded by the VAE and the text encoders of this model, as far as both are known.

    Raises:
        ValueError: it was not; names what differs.
    """
    here = {
        "vae": None if model.latents is None else vae_identity(model.latents),
        "text": None if model.text is None else text_identity(model.text),
    }
    differing = [
        f"{key} is {data.facts[key]} there and {value} in the model"
        for key, value in here.items()
        if value is not None and key in data.facts and data.facts[key] != value  # pairs of classes have neither
    ]
    if differing:
        way_out = "Encode the images for this one" if isinstance(data, Encoded) else "Draw the pairs for this one"
        raise ValueError(f"{name} was encoded by another model: {'; '.join(differing)}. {way_out}")


def _columns(model: Model, rows: Rows, name: str) -> tuple[dict[str, Tensor], list[str]]:
    """What the model is told of each row: which of the distinct captions is its own, or its class. And those captions.

    Raises:
        ValueError: the data does not say it.
    """
    columns, captions, classes = {}, {}, classes_of(model)
    if model.text is not None:
        if rows.captions is None:
            raise ValueError(
                f"the model is conditioned on text, and {name} has no captions: a folder has them in metadata.jsonl, "
                'a line an image, {"file_name": "0001.png", "text": "a cat"}, or in 0001.txt beside 0001.png'
            )
        columns["text"] = torch.tensor([captions.setdefault(caption, len(captions)) for caption in rows.captions])
    if classes:
        if rows.labels is None:
            raise ValueError(f"the model has {classes} classes, and {name} has no labels: sub-folders are classes")
        labels = columns["class_labels"] = torch.tensor(rows.labels)
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise ValueError(f"{name} has labels {low} to {high}, and the model the classes 0 to {classes - 1}")
    return columns, list(captions)
