"""Images and what is said of them, where they lie: folders and Hugging Face data sets.

Nothing is decoded here: ``fewstep.generation.encoding`` turns them into what a latent model trains on.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fewstep.data.decode import Source
from fewstep.data.listing import Folder, open_folder, stamp
from fewstep.data.metadata import (
    CAPTIONS,
    METADATA,
    SIDECARS,
    caption_in,
    captions_in,
    checked,
    metadata_files,
    sidecars,
    text_of,
)
from fewstep.data.tables import PICTURE_KINDS, find_columns, held_by, open_table, read_column, undecoded


@dataclass(frozen=True)
class Rows:
    """Images, a row each: ``read`` gives the files (or their bytes) of a slice, ``names`` what to call them.

    ``captions`` and ``labels`` (whole numbers, of ``classes``) are one a row, None where there are none. ``problems``
    says of rows that cannot be used why. ``sizes`` are height and width of each, or why it cannot be read, where they
    are known already.
    """

    names: Sequence[str]
    read: Callable[[slice], Sequence[Source]]
    captions: Sequence[str] | None = None
    labels: Sequence[int] | None = None
    classes: tuple[str, ...] = ()
    problems: dict[int, str] = field(default_factory=dict)
    sizes: Sequence[tuple[int, int] | str] | None = None

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Captioned:
    """A source of images and captions, by its ``name``. ``identity`` changes when they do; ``rows`` are listed when
    first needed."""

    name: str
    identity: str
    _list: Callable[[], Rows]

    @cached_property
    def rows(self) -> Rows:
        return self._list()


def image_folder(
    name: str | Path,
    caption: str | None = None,
    labels: bool = True,
    captions: bool = True,
    split: str | None = None,
) -> Captioned:
    """The images of a folder and those below it, with their captions.

    Where there is a ``metadata.jsonl``, ``.csv`` or ``.parquet`` (one in each sub-folder, if one likes), its rows are
    the images: ``file_name`` beside it, and the caption in ``text`` (else ``caption`` or ``prompt``). Otherwise all
    images are taken, the caption of ``0.png`` is in ``0.txt`` or ``0.caption``, and sub-folders are classes as in
    ``fewstep.data.images.image_folder``.

    Args:
        caption: the column of the captions, or ``txt`` or ``caption`` for files of that suffix. labels: whether
            sub-folders are classes. captions: whether captions are wanted; otherwise they are not read.
        split: which part of the folder is used: see ``fewstep.data.listing.open_folder``.

    Raises:
        FileNotFoundError: no such folder, or no images in it.
        ValueError: an unknown column, or a line that is no row.
    """
    folder = open_folder(Path(name).expanduser(), split)
    if captions and (files := metadata_files(folder)):
        return _of_rows(folder, files, caption)
    texts = _beside(folder, caption) if captions else None
    said, problems = (None, {}) if texts is None else checked(texts)
    classes, numbers = folder.classes() if labels else ([], [])
    paths = [folder.root / name for name in folder.names]
    rows = Rows([*map(str, paths)], paths.__getitem__, said, numbers if classes else None, tuple(classes), problems)
    what = rows.labels if said is None else [rows.labels, said]
    identity = identity_of("folder", [stamp(folder.root, name) for name in folder.names], what)
    return Captioned(str(folder.root), identity, lambda: rows)


def _beside(folder: Folder, caption: str | None) -> list[str | None] | None:
    """The captions in files beside the images; None where there are no such files."""
    kinds = [kind for kind in SIDECARS if caption in (None, kind.removeprefix("."))]
    files = sidecars(folder, kinds)
    if any(files):
        return [caption_in(file) for file in files]
    if caption is not None:
        raise ValueError(
            f"caption: {caption} names a column of {METADATA[0]}, and there is none in {folder.root} "
            f"(nor {', '.join(METADATA[1:])}; txt or caption names files beside the images)"
        )
    return None


def _of_rows(folder: Folder, files: Sequence[str], caption: str | None) -> Captioned:
    """The images that files of rows name."""
    root, used = folder.root, set(folder.names)
    listed = [row for file in files for row in captions_in(root / file, root, caption)]
    # A file above the folders of a split names the images of all of them.
    listed = [(name, text, why) for name, text, why in listed if name in used or why or not folder.depth]
    if not listed:
        raise ValueError(f"{root / files[0]} names no image that is used")
    if unnamed := used.difference(name for name, _, _ in listed):
        warnings.warn(
            f"{len(unnamed)} images such as {min(unnamed)} of {root} are named in no {files[0].rpartition('/')[2]} "
            "and left out",
            stacklevel=4,
        )
    texts, problems = checked([text for _, text, _ in listed])
    problems |= {i: why for i, (_, _, why) in enumerate(listed) if why}
    paths = [root / name for name, _, _ in listed]
    rows = Rows([*map(str, paths)], paths.__getitem__, texts, problems=problems)
    identity = identity_of("folder", [stamp(root, name) for name, _, _ in listed], texts)
    return Captioned(str(root), identity, lambda: rows)


def hugging_face(
    name: str | Path,
    split: str = "train",
    config: str | None = None,
    image: str | None = None,
    caption: str | None = None,
    label: str | None = None,
    labels: bool = True,
    captions: bool = True,
) -> Captioned:
    """A data set of the Hugging Face hub (``hf:NAME``), or a folder that ``save_to_disk`` wrote.

    Args:
        split, config: which part of it.
        image: the column of images, by default the first. caption: that of the captions, by default ``text``,
            ``caption`` or ``prompt``, else the only one of text. label: that of the classes.
        labels, captions: whether they are wanted.

    Raises:
        FileNotFoundError: the data set cannot be had. ValueError: an unknown split or column, or no images.
    """
    source = str(name).removeprefix("hf:")
    table = open_table(source, split, config)
    kinds, image, label = find_columns(table, source, image, label, caption)
    if image is None or kinds[image] not in PICTURE_KINDS:
        raise ValueError(f"{source} has no column of images{f' {image}' if image else ''}, only {held_by(kinds)}")
    texts = [
        c for c, f in table.features.items() if c != image and getattr(f, "dtype", None) in ("string", "large_string")
    ]
    known = (c for c in CAPTIONS if c in kinds and c != image)
    caption = caption or next(known, texts[0] if len(texts) == 1 else None)
    caption = caption if captions else None
    read = undecoded(table, image, kinds[image])

    def rows() -> Rows:
        said, problems = (None, {}) if caption is None else checked(map(text_of, read_column(table, caption)))
        return Rows(
            [f"row {i} of {source}" for i in range(len(table))],
            read,
            said,
            read_column(table, label) if label and labels else None,
            tuple(table.features[label].names) if label and kinds[label] == "ClassLabel" else (),
            problems,
        )

    identity = identity_of("hugging-face", table._fingerprint, [image, caption, label, labels])
    return Captioned(str(name), identity, rows)


def identity_of(kind: str, *what: Any) -> str:
    """A source by its kind and a hash of what decides its rows."""
    return f"{kind} {hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}"
