"""Images of many shapes and the sizes that they are cut to: aspect buckets, of about the same area each.

The rule is that of most trainers: the sides are multiples of a step, an image goes into the bucket whose aspect is
nearest to its own in the logarithm, is scaled to cover it, and what stands out is cut off on both sides alike.
"""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fewstep.common.disk import replace_file
from fewstep.common.errors import shown, unknown
from fewstep.common.reading import parse_json, read_text
from fewstep.common.user_folders import cache_folder
from fewstep.data.decode import Read, check_side, size_or_why, unreadable

Size = tuple[int, int]  # height and width in pixels

LONGEST = 4.0  # the aspect of the longest bucket, and the inverse of that of the tallest
SMALL = ("enlarge", "drop")
_FINENESS = 16  # buckets differ by this part of the side of the square, where the model takes that
_MUCH = 1 / 3  # of an image; the crop of more is told
_AT_ONCE = 1024


def step_for(size: int, multiple: int = 8, step: int | None = None) -> int:
    """Of what the sides of buckets are multiples: of ``multiple``, which the model needs, and not much finer than a
    sixteenth of ``size``, so that buckets are not many. A ``step`` that is said has to be such a multiple.

    Raises:
        ValueError: a size or a step that is none.
    """
    check_side(size)
    if size % multiple:
        raise ValueError(
            f"size: {size} with buckets: the sides of images for this model are multiples of {multiple}, so the size "
            f"is {max(multiple, size // multiple * multiple)} or {(size // multiple + 1) * multiple}"
        )
    if step is not None:
        if type(step) is not int or step < 1 or step % multiple or step > size:
            raise ValueError(f"bucket_step: {shown(step)}: a multiple of {multiple} up to the size, {size}, is needed")
        return step
    fine = [k for k in range(multiple, size + 1, multiple) if size % k == 0 and k <= max(multiple, size // _FINENESS)]
    return fine[-1]


def bucket_sizes(size: int, step: int) -> list[Size]:
    """The buckets, from the widest to the tallest: sides that are multiples of ``step``, the longer one as long as the
    area of the square of ``size`` allows, up to four times the shorter. For 1024 by 64 they are those of SDXL."""
    sides = [(short, size * size // short // step * step) for short in range(step, size + 1, step)]
    wide = [(short, long) for short, long in sides if long <= LONGEST * short]
    return [*wide, *((long, short) for short, long in reversed(wide) if long != short)]


def nearest(sizes: Sequence[Size], height: int, width: int) -> int:
    """Which of the sizes has the aspect that is nearest to that of an image, by its logarithm."""
    aspect = math.log(width / height)
    return min(range(len(sizes)), key=lambda i: abs(math.log(sizes[i][1] / sizes[i][0]) - aspect))


@dataclass(frozen=True)
class Place:
    """Where an image is cut: its own ``height`` and ``width``, and the ``top`` and ``left`` of the crop in pixels of
    the scaled image, as SDXL is told them."""

    height: int
    width: int
    top: int
    left: int

    @classmethod
    def of(cls, own: Size, bucket: Size) -> "Place":
        scale = max(bucket[0] / own[0], bucket[1] / own[1])
        top, left = (round((side * scale - wanted) / 2) for side, wanted in zip(own, bucket, strict=True))
        return cls(*own, top, left)

    def share_of(self, bucket: Size) -> float:
        """How much of the image is kept."""
        scale = max(bucket[0] / self.height, bucket[1] / self.width)
        return bucket[0] * bucket[1] / (self.height * self.width * scale * scale)


@dataclass(frozen=True)
class Assigned:
    """Images by bucket: the ``sizes`` that are used, the ``rows`` of each in their order, and the place of each row."""

    sizes: list[Size]
    rows: list[list[int]]
    places: dict[int, Place]


def sizes_of(read: Read, names: Sequence[str], fingerprint: object) -> list[Size | str]:
    """Height and width of each image, or why they cannot be read; from the cache where they were asked for before."""
    key = hashlib.sha256(json.dumps(fingerprint).encode()).hexdigest()[:32]
    file = cache_folder() / "sizes" / f"{key}.json"
    if file.is_file():
        return [one if isinstance(one, str) else (one[0], one[1]) for one in parse_json(read_text(file), str(file))]
    found: list[Size | str] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(names), _AT_ONCE):
            found += pool.map(size_or_why, read(slice(start, start + _AT_ONCE)))
    replace_file(file, json.dumps(found).encode())
    return found


def assign(
    found: Sequence[Size | str],
    names: Sequence[str],
    sizes: Sequence[Size],
    small: str = "enlarge",
    on_error: str = "raise",
) -> Assigned:
    """Which image goes into which bucket; says in a line what is enlarged, and what loses much of itself.

    Args:
        found: height and width of each image, or why they cannot be read. names: what to call them.
        small: what becomes of an image that is smaller than its bucket: enlarge, or drop.
        on_error: of one that cannot be read: raise, or skip.

    Raises:
        ValueError: an image that cannot be read, or none that is left.
    """
    if small not in SMALL:
        raise unknown("small", small, SMALL)
    rows: list[list[int]] = [[] for _ in sizes]
    places: dict[int, Place] = {}
    tiny: list[int] = []
    cut: list[int] = []
    for row, own in enumerate(found):
        if isinstance(own, str):
            if on_error == "raise":
                raise unreadable(names[row], own)
            continue
        which = nearest(sizes, *own)
        bucket = sizes[which]
        if own[0] < bucket[0] or own[1] < bucket[1]:
            tiny.append(row)
            if small == "drop":
                continue
        place = Place.of(own, bucket)
        if place.share_of(bucket) < 1 - _MUCH:
            cut.append(row)
        rows[which].append(row)
        places[row] = place
    _tell(found, names, tiny, cut, small)
    if bad := {row: why for row, why in enumerate(found) if isinstance(why, str)}:
        row = next(iter(bad))
        warnings.warn(
            f"{len(bad)} of {len(names)} images cannot be read and are left out ({names[row]}: {bad[row]})",
            stacklevel=4,
        )
    if not places:
        why = "all are smaller than their bucket, and small: drop leaves them out" if tiny else "none can be read"
        raise ValueError(f"none of the {len(names)} images can be used: {why}")
    used = [i for i, some in enumerate(rows) if some]
    return Assigned([sizes[i] for i in used], [rows[i] for i in used], places)


def _tell(
    found: Sequence[Size | str], names: Sequence[str], tiny: Sequence[int], cut: Sequence[int], small: str
) -> None:
    def one(row: int) -> str:
        own = found[row]
        return f"{names[row]}, {own[1]} x {own[0]}"  # the size of one that could be read

    if tiny:
        done = "left out" if small == "drop" else "enlarged (small: drop leaves them out)"
        first = min(tiny, key=lambda row: int(found[row][0]) * int(found[row][1]))
        warnings.warn(
            f"{len(tiny)} of {len(names)} images are smaller than their bucket and {done}, the smallest is "
            f"{one(first)}",
            stacklevel=5,
        )
    if cut:
        warnings.warn(
            f"{len(cut)} of {len(names)} images lose more than a third, since no bucket is longer than "
            f"{LONGEST:g} to 1; one is {one(cut[0])}",
            stacklevel=5,
        )
