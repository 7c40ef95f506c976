"""Where images with captions come from, found by name."""

import os
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from fewstep.common.errors import unknown
from fewstep.common.options import arguments
from fewstep.data import encoded, pairs
from fewstep.data.captions import Captioned, hugging_face, image_folder
from fewstep.data.remote import is_remote
from fewstep.data.tables import PICTURE_KINDS, is_saved_to_disk, kind_of, open_table
from fewstep.data.tars import is_shards, webdataset

# What an encoding of images takes beside the options of their kind.
_OF_ENCODING = ("size", "buckets", "bucket_step", "small", "dtype", "on_error")
_KINDS = {
    image_folder: "a folder of images",
    hugging_face: "a Hugging Face data set",
    webdataset: "webdataset shards",
}
# Files of folders that are other data.
_OTHERS = (pairs.FACTS, encoded.FACTS, "*idx3-ubyte*", "*_batch*.bin")


def is_pictures(name: str | Path, options: Mapping[str, Any]) -> bool:
    """Whether a data set of this name is one of images, which :func:`listed` lists."""
    load = opener(name)
    if load is not hugging_face:
        return load is not None
    known = {option: options[option] for option in ("split", "config") if option in options}
    known = arguments("data", hugging_face, known, given=("name",))
    table = open_table(str(name).removeprefix("hf:"), known["split"], known["config"])
    column = options.get("image")
    return any(kind_of(table, c) in PICTURE_KINDS for c in table.features if column in (None, c))


def listed(name: str | Path, captions: bool = True, /, **options: Any) -> Captioned:
    """The images of a data set by its name, with the options of its kind; and their captions, where they are wanted.

    Raises:
        FileNotFoundError: it is not there. ValueError: it is no data of images, or does not take such an option.
    """
    load = opener(name)
    if load is None:
        path = Path(name).expanduser()
        if not os.path.exists(path) and ("/" in str(name) or path.suffix):
            raise FileNotFoundError(f"no data at {str(name)[:200]}: there is no such file or folder")
        raise ValueError(
            f"{name} is no data of images that can be encoded: a folder, hf:NAME, what save_to_disk wrote, or "
            "webdataset shards (.tar) are"
        )
    takes = _options_of(load)
    for option in options:
        if option not in takes:
            if kinds := [what for other, what in _KINDS.items() if option in _options_of(other)]:
                raise ValueError(f"{option} is an option of {kinds[0]}, and {name} is {_KINDS[load]}: leave it out")
            raise unknown(f"option of {name}", option, [*takes, *_OF_ENCODING])
    return load(name, captions=captions, **arguments("data", load, options, given=("name", "captions")))


def _options_of(load: Callable[..., Captioned]) -> list[str]:
    return [option for option in signature(load).parameters if option not in ("name", "captions")]


def opener(name: str | Path) -> Callable[..., Captioned] | None:
    """What lists the images of a data set of this name; None where it is none of images."""
    if is_remote(str(name)):
        return webdataset
    if str(name).startswith("hf:"):
        return hugging_face
    path = Path(name).expanduser()
    if path.name.endswith(".tar"):
        return webdataset
    if not os.path.isdir(path) or any(any(path.glob(pattern)) for pattern in _OTHERS):
        return None
    if is_saved_to_disk(path):
        return hugging_face
    return webdataset if is_shards(path) else image_folder
