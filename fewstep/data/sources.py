"""Where pictures with captions come from, found by name."""

from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from fewstep.data import encoded, pairs
from fewstep.data.captions import Captioned, hugging_face, image_folder
from fewstep.data.pictures import is_saved_to_disk, open_hugging_face
from fewstep.data.tars import is_shards, webdataset
from fewstep.errors import unknown

# Files of folders that are other data.
_OTHERS = (pairs.FACTS, encoded.FACTS, "*idx3-ubyte*", "*_batch*.bin")


def is_pictures(name: str | Path, options: Mapping[str, Any]) -> bool:
    """Whether a data set of this name is one of pictures, which :func:`listed` lists."""
    load = opener(name)
    if load is not hugging_face:
        return load is not None
    table = open_hugging_face(str(name).removeprefix("hf:"), options.get("split", "train"), options.get("config"))
    return any(type(feature).__name__ == "Image" for feature in table.features.values())


def listed(name: str | Path, captions: bool = True, /, **options: Any) -> Captioned:
    """The pictures of a data set by its name, with the options of its kind; and their captions, where they are wanted.

    Raises:
        FileNotFoundError: it is not there. ValueError: it is no data of pictures, or does not take such an option.
    """
    load = opener(name)
    if load is None:
        path = Path(name).expanduser()
        if not path.exists() and ("/" in str(name) or path.suffix):
            raise FileNotFoundError(f"no data at {name}: there is no such file or folder")
        raise ValueError(
            f"{name} is no data of pictures that can be encoded: a folder, hf:NAME, what save_to_disk wrote, or "
            "webdataset shards (.tar) are"
        )
    takes = [option for option in signature(load).parameters if option not in ("name", "captions")]
    for option in options:
        if option not in takes:
            raise unknown(f"option of {name}", option, [*takes, "size", "dtype", "on_error"])
    return load(name, captions=captions, **options)


def opener(name: str | Path) -> Callable[..., Captioned] | None:
    """What lists the pictures of a data set of this name; None where it is none of pictures."""
    if str(name).startswith("hf:"):
        return hugging_face
    path = Path(name).expanduser()
    if path.name.endswith(".tar"):
        return webdataset
    if not path.is_dir() or any(any(path.glob(pattern)) for pattern in _OTHERS):
        return None
    if is_saved_to_disk(path):
        return hugging_face
    return webdataset if is_shards(path) else image_folder
