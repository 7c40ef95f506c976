"""Data sets and densities. ``load_data`` finds one by the name or path that a recipe gives.

scikit-learn, datasets and Pillow are imported by the loaders that need them.
"""

import os
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

from fewstep.common import errors
from fewstep.common.options import arguments
from fewstep.common.reading import TEXTS, no_file
from fewstep.data import encoded, files, fluids, tables, text, toy
from fewstep.data import images as pictures
from fewstep.data.arrays import ArrayData
from fewstep.data.batch import Batch, Data
from fewstep.data.between import Between
from fewstep.data.buckets import Buckets
from fewstep.data.conditions import Dropped, Strengths
from fewstep.data.encoded import Encoded
from fewstep.data.formats import is_picture
from fewstep.data.only import Only
from fewstep.data.order import epoch_indices
from fewstep.data.pairs import FACTS, Pairs
from fewstep.data.prior import Prior
from fewstep.data.remote import check_address, is_remote
from fewstep.data.residual import Residual, upsampled
from fewstep.data.tars import is_shards
from fewstep.data.text import Text
from fewstep.data.toy import Toy

__all__ = [
    "FACTS",
    "ArrayData",
    "Batch",
    "Between",
    "Buckets",
    "Data",
    "Dropped",
    "Encoded",
    "Pairs",
    "Prior",
    "Residual",
    "Strengths",
    "Text",
    "Toy",
    "epoch_indices",
    "load_data",
    "upsampled",
]

_ENCODED = (
    "webdataset shards are for latent models, which they are encoded for: for a model of pixels, unpack them into a "
    "folder of images (tar -xf)"
)
NAMED: dict[str, Callable[..., Any]] = {
    "checkerboard": toy.checkerboard,
    "two-moons": toy.two_moons,
    "eight-gaussians": toy.eight_gaussians,
    "spiral": toy.spiral,
    "pinwheel": toy.pinwheel,
    "swiss-roll": toy.swiss_roll,
    "silhouette": toy.silhouette,
    "digits": files.digits,
    "mnist": files.mnist,
    "fashion-mnist": files.fashion_mnist,
    "vorticity": fluids.vorticity,
    "python-topics": text.python_topics,
}


def load_data(name: str | Path, **options: Any) -> Data:
    """The data that ``name`` stands for, with the options of its loader (``split``, ``size``, ``flip``, ...); with
    ``only``, a class or a list of them by number or name, the rows of these alone.

    Args:
        name: one of the names above; ``hf:NAME`` on the Hugging Face hub; or a path: a folder of images, of IDX
            files, of binary CIFAR-10 batches, of reflow pairs, of ``fewstep encode`` or from ``save_to_disk``, a
            ``.npy``, ``.npz``, IDX or ``.txt`` file.

    Raises:
        ValueError: an unknown name, or an option that the loader does not take, or not of that type; lists what is
            known.
        FileNotFoundError: a path that is not there.
    """
    name = str(name)
    if is_remote(name):
        check_address(name)
        raise ValueError(f"{name[:200]}: {_ENCODED}")
    load: Callable[..., Any]
    source: tuple[str | Path, ...]
    if name in NAMED:
        load, source = NAMED[name], ()
    elif name.startswith("hf:"):
        load, source = pictures.hugging_face, (name.removeprefix("hf:"),)
    else:
        path = Path(name).expanduser()
        if path.suffix == ".tar":  # of a pattern, nothing has that name
            raise ValueError(f"{name[:200]}: {_ENCODED}")
        if not os.path.exists(path):  # not path.exists(), which raises for a name that is too long
            if "/" in name or os.sep in name or name.startswith((".", "~")) or path.suffix in (".npy", ".npz"):
                raise FileNotFoundError(f"no data at {name[:200]}: there is no such file or folder")
            raise ValueError(f"{errors.unknown('data set', name, NAMED)}; and nothing is at that path here")
        load, source = _loader_of(path), (path,)

    only, said = options.get("only"), options
    options = {option: value for option, value in options.items() if option != "only"}
    takes = list(signature(load).parameters)[len(source) :]
    for option in options:
        if not takes:
            raise ValueError(f"data set {name!r} takes no options, got {option!r}")
        if option not in takes:
            raise errors.unknown(f"option of {name}", option, takes)
    given = tuple(signature(load).parameters)[: len(source)]
    found = load(*source, **arguments("data", load, options, given))
    if only is not None:
        found = Only(found, only if isinstance(only, list | tuple) else [only])
    place = Path(name).expanduser()
    is_place = source and os.path.exists(place)
    vars(found)["source"] = {"name": str(place.resolve()) if is_place else name, **said}  # as a recipe says it
    return found


def _loader_of(path: Path) -> Callable[..., Any]:
    """Which loader reads this file or folder."""
    if not path.is_dir():
        if why := no_file(path):
            raise ValueError(f"{path} is no data: {why}")
        if path.suffix in (".npy", ".npz"):
            return files.npy
        if "idx" in path.name:
            return files.idx
        if path.suffix in TEXTS:
            return text.text_file
        raise ValueError(f"{path} is no file of data that fewstep reads: .npy, .npz, IDX, .txt, or a folder")
    if (path / FACTS).is_file():
        return Pairs
    if (path / encoded.FACTS).is_file():
        return Encoded
    if tables.is_saved_to_disk(path):
        return pictures.hugging_face
    if any(path.glob("*idx3-ubyte*")):
        return files.idx
    if any(path.glob("*_batch*.bin")):
        return files.cifar_binary
    if is_shards(path):
        raise ValueError(f"{path}: {_ENCODED}")
    inside = sorted(path.iterdir())
    arrays = [file.name for file in inside if file.suffix in (".npy", ".npz")]
    if arrays and not any(file.is_dir() or is_picture(file.name) for file in inside):
        raise ValueError(
            f"{path} is a folder of {len(arrays)} files of arrays: name one, {arrays[0]}, or put their rows, cut to "
            "one shape, into one, np.savez('all.npz', data=np.stack(rows))"
        )
    return pictures.image_folder
