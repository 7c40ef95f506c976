"""Which files are images: those that the installed Pillow reads by itself."""

import os
from contextlib import suppress
from functools import cache

# Formats that Pillow hands to another program, or has no decoder for.
_NOT_READ = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
# The suffixes in messages: all of them are too many.
PICTURES = ".png, .jpg, .webp and what else Pillow reads"


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read, in the order in which it tries them. HEIC is among them where the
    package pillow-heif is installed."""
    from PIL import Image

    with suppress(ImportError):
        import pillow_heif  # pyright: ignore[reportMissingImports]

        pillow_heif.register_heif_opener()
    Image.init()
    named = set(Image.registered_extensions().values())
    return tuple(name for name in Image.ID if name in named and name not in _NOT_READ)


@cache
def _suffixes() -> frozenset[str]:
    from PIL import Image

    read = set(formats())
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in read)


def is_picture(name: str) -> bool:
    """Whether a file of this name is an image that is read."""
    return os.path.splitext(name)[1].lower() in _suffixes()
