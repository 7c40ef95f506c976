"""The shards of encoded data, and the index that says they are all there."""

import copy
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.common.disk import replace_file
from fewstep.common.reading import parse_json, read_text
from fewstep.data.captions import Captioned, Rows
from fewstep.data.decode import decode, unreadable
from fewstep.data.encoded import INDEX
from fewstep.data.texts import NULL, TEXTS, text_files
from fewstep.flows.signature import Model
from fewstep.generation.bucketing import Part
from fewstep.generation.texts import DTYPES, cast, is_kept, keep, known_by, note_of, read_note, write_texts

Turns = Callable[[int], list[int]]  # which of so many shards are made


@dataclass(frozen=True, eq=False)
class Encoding:
    """Data that are encoded for a model into the folder ``out``: any process can make any of its shards."""

    model: Model
    source: Captioned
    out: Path
    facts: dict[str, Any]
    columns: dict[str, Tensor]
    captions: list[str]
    parts: list[Part]
    batch: int
    place: torch.device

    @property
    def size(self) -> int:
        """Images and captions."""
        return sum(len(part.rows) for part in self.parts) + len(self.captions)

    @property
    def latents(self) -> list[tuple[Path, Part]]:
        """The files of images, and what is in each."""
        shard = self.facts["shard"]
        cut = [part.some(i, shard) for part in self.parts for i in range(0, len(part.rows), shard)]
        return [(self.out / f"latents-{i:05d}.safetensors", part) for i, part in enumerate(cut)]

    def write_texts(self, turns: Turns, tick: Callable[[int], None]) -> None:
        """The shards of captions whose turn it is."""
        if self.model.text is None:
            return
        sides, dtype = (self.facts["size"], self.facts["size"]), self.facts["dtype"]
        how: dict[str, Any] = {"dtype": dtype, "batch": self.batch, "device": self.place}
        write_texts(self.model.text, self.captions, self.out, size=sides, **how, turns=turns, tick=tick)

    def write_latents(self, turns: Turns, tick: Callable[[int], None]) -> None:
        """The shards of images whose turn it is."""
        rows, facts, files = self.source.rows, self.facts, self.latents
        vae: Any = copy.copy(self.model.latents)  # so that it is let go again
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for file, part in map(files.__getitem__, turns(len(files))):
                if is_kept(file):
                    tick(len(part.rows))
                    continue
                pictures = _pictures(rows, part, vae.image_channels, self.batch, facts["on_error"], pool)
                keep(file, _encoded(vae, pictures, self.columns, part.shape, facts["dtype"], self.place, tick))

    def finish(self) -> int:
        """Write the index, where all shards are there; returns how many are not."""
        files, texts = [file for file, _ in self.latents], []
        if self.model.text is not None:
            known = parse_json(read_text(self.out / TEXTS), str(self.out / TEXTS))
            texts = [self.out / NULL, *text_files(self.out, known)]
        missing = [file for file in (*files, *texts) if not (file.is_file() and note_of(file).is_file())]
        if not missing:
            index = {file.name: read_note(file) for file in (*files, *texts)}
            if not any(index[file.name]["rows"] for file in files):
                raise ValueError(f"none of the {len(self.source.rows)} images of {self.source.name} can be used")
            if texts:
                index[TEXTS] = known_by((self.out / TEXTS).read_bytes(), len(self.captions))
            replace_file(self.out / INDEX, (json.dumps(index, indent=1) + "\n").encode())
        return len(missing)


def _pictures(
    rows: Rows, part: Part, channels: int, batch: int, on_error: str, pool: ThreadPoolExecutor
) -> Iterator[tuple[list[int], np.ndarray]]:
    """The images of some rows, decoded a batch ahead, and which rows they are: those that can be used."""
    batches = [part.rows[start : start + batch] for start in range(0, len(part.rows), batch)]

    def begin(some: Sequence[int]) -> list[Any]:
        in_order = isinstance(some, range)
        sources = rows.read(slice(some.start, some.stop)) if in_order else [rows.read(slice(i, i + 1))[0] for i in some]
        return [pool.submit(decode, source, part.size, channels) for source in sources]

    pending = begin(batches[0])
    for places, following in pairwise([*batches, None]):
        assert places is not None
        now, pending = pending, [] if following is None else begin(following)
        found = {}
        for row, job in zip(places, now, strict=True):
            pixels = rows.problems.get(row) or job.result()
            if not isinstance(pixels, str):
                found[row] = pixels
            elif on_error == "raise":
                raise unreadable(rows.names[row], pixels)
        yield list(found), np.stack(list(found.values())) if found else np.empty((0, channels, *part.size), np.uint8)


def _encoded(
    latents: Any,
    pictures: Iterator[tuple[list[int], np.ndarray]],
    columns: dict[str, Tensor],
    shape: tuple[int, ...],
    dtype: str,
    place: torch.device,
    tick: Callable[[int], None],
) -> dict[str, Tensor]:
    """The rows of a shard."""
    parts: list[Tensor] = [torch.empty(0, *shape, dtype=DTYPES[dtype])]
    kept: list[int] = []
    for index, pixels in pictures:
        if index:
            images = torch.from_numpy(pixels).to(place).float().sub_(127.5).div_(127.5)
            parts.append(cast(latents.encode(images), dtype, "latents"))
        kept += index
        tick(len(index))
    return {"latents": torch.cat(parts), **{name: value[kept] for name, value in columns.items()}}
