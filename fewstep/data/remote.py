"""Shards behind URLs: read one after another, of which so many at most are on the disk, for all processes of a machine.

Nothing that is fetched is executed, and nothing is fetched but what a name says.
"""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fewstep.common.errors import briefly, shown
from fewstep.common.locks import is_at, lock
from fewstep.common.reading import parse_json, read_text
from fewstep.common.write_errors import cannot_write

KEEP = 4  # shards on the disk
_SECONDS, _TRIES, _CHUNK = 60.0, 5, 1 << 20
_PAUSE = 1.0  # seconds before another try, twice as long each time
_AT_ONCE = 8  # shards that are asked for their length


def is_remote(name: str) -> bool:
    """Whether a name is an address, and not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|pipe:", name) is not None


def check_address(name: str) -> None:
    """That shards can be read from there.

    Raises:
        ValueError: a command, or an address of another kind.
    """
    if name.startswith("pipe:"):
        raise ValueError(
            f"{shown(name)} is a command, and none is run: give the address itself, https://... or hf://..."
        )
    if not name.startswith(("http://", "https://", "hf://datasets/")):
        kind = name.partition("://")[0]
        raise ValueError(
            f"{shown(_named(name))}: shards are read from http://, https:// and hf://datasets/ addresses, or files; of "
            f"{kind}:// give a signed https:// address, or mount it as a folder"
        )


@dataclass(frozen=True)
class Remote:
    """A file behind an address, as its server described it."""

    url: str
    size: int
    tag: str

    @property
    def name(self) -> str:
        return _named(self.url)

    @property
    def stamp(self) -> list[Any]:
        """What changes when the file does."""
        return [self.name, self.size, self.tag]


def described(urls: Sequence[str]) -> list[Remote]:
    """The files behind addresses, in order.

    Raises:
        FileNotFoundError: one is not there. ValueError: its server does not say how long it is.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(_described, urls))


def _described(url: str) -> Remote:
    with _asked(url, 0, 0) as answer:
        whole = re.fullmatch(r"bytes 0-0/([0-9]{1,18})", answer.headers.get("Content-Range", ""))
        size = whole[1] if whole else answer.headers.get("Content-Length", "")
        tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
    if not size.isdigit() or int(size) == 0:
        raise ValueError(f"the server of {_named(url)} does not say how long it is: fetch the file, and name that")
    return Remote(url, int(size), tag)


class Slots:
    """A folder with room for so many files, which processes share: each is one's own for as long as it is read.

    Args:
        keep: how many; those that were not read for the longest time make room.
    """

    def __init__(self, folder: Path, keep: int = KEEP) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}: one shard has to be on the disk, to be read")
        self.files = [folder / f"{i:03d}.shard" for i in range(keep)]
        for file in {*folder.glob("*.shard")}.difference(self.files):  # of one that kept more
            with suppress(FileNotFoundError), file.open("rb") as stream:
                if lock(stream):
                    _note(file).unlink(missing_ok=True)
                    file.unlink()

    @contextmanager
    def file(self, remote: Remote) -> Iterator[Path]:
        """The file, fetched if it is not there, and locked."""
        with cannot_write(self.files[0].parent):
            self.files[0].parent.mkdir(parents=True, exist_ok=True)
        while True:
            mine = [file for file in self.files if _content(file) == remote.stamp]
            # Where it is in nobody's slot, the oldest that nobody reads.
            for file in mine or sorted(self.files, key=_read_at):
                with open(file, "ab+") as stream:
                    if not lock(stream) or not is_at(stream, file):
                        continue
                    if _content(file) != remote.stamp or os.fstat(stream.fileno()).st_size != remote.size:
                        _note(file).unlink(missing_ok=True)
                        with cannot_write(file):
                            _fetch(remote, stream)
                            _note(file).write_text(json.dumps(remote.stamp))
                    os.utime(file)
                    yield file
                    return
            time.sleep(0.05)


def _note(file: Path) -> Path:
    return file.with_suffix(".json")


def _content(file: Path) -> Any:
    """What a slot holds, whole; None where nothing."""
    try:
        return parse_json(read_text(_note(file)), str(file))
    except (OSError, ValueError):
        return None


def _read_at(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _fetch(remote: Remote, stream: IO[bytes]) -> None:
    """All of a file into an open one, from the start; a connection that breaks is taken up where it broke."""
    stream.truncate(0)
    pause, why = _PAUSE, ""
    for tried in range(1, _TRIES + 1):
        there = stream.seek(0, os.SEEK_END)
        try:
            with _asked(remote.url, there) as answer:
                if (answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "") != remote.tag:
                    raise ValueError(f"{remote.name} is another file than it was at the start: start again")
                if answer.status != 206:
                    stream.truncate(0)
                while chunk := answer.read(_CHUNK):
                    stream.write(chunk)
                    if stream.tell() > remote.size:
                        raise ValueError(f"{remote.name} is longer than its server said, {remote.size} bytes")
            if stream.tell() == remote.size:
                stream.flush()
                return
            why = f"{stream.tell()} of {remote.size} bytes came"
        except FileNotFoundError:
            raise
        except (ConnectionError, TimeoutError, http.client.HTTPException) as error:
            why = briefly(error)
        if tried < _TRIES:
            time.sleep(pause)
            pause *= 2
    raise OSError(f"{remote.name} could not be fetched in {_TRIES} tries ({why}): the same command goes on")


@contextmanager
def _asked(url: str, start: int, stop: int | None = None) -> Iterator[Any]:
    """The answer of a server, of the bytes from ``start`` on, if it gives parts.

    Raises:
        FileNotFoundError: it says that there is no such file, or that it is not for all.
        ConnectionError: it cannot be reached.
    """
    request = _request(url)
    if start or stop is not None:
        request.add_header("Range", f"bytes={start}-{'' if stop is None else stop}")
    try:
        answer = urllib.request.urlopen(request, timeout=_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code >= 500 or error.code == 429:
            raise ConnectionError(f"{error.code} {error.reason}") from None
        raise FileNotFoundError(f"no shard {_named(url)}: its server says {error.code} {error.reason}") from None
    except (urllib.error.URLError, ValueError, http.client.InvalidURL) as error:
        raise ConnectionError(f"{_named(url)} cannot be reached ({briefly(error)})") from None
    with closing(answer):
        yield answer


def _request(url: str) -> urllib.request.Request:
    """What is asked of a server; on the Hugging Face hub with one's token, which no other server gets to see."""
    if not url.startswith("hf://"):
        return urllib.request.Request(url, headers={"User-Agent": "fewstep"})
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{url[:200]} is on the Hugging Face hub, and HF_HUB_OFFLINE says that it is not asked")

    found = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", url)
    if found is None:
        raise ValueError(f"{url[:200]} names no file of a data set: hf://datasets/OWNER/NAME/train-000.tar")
    request = urllib.request.Request(hf_hub_url(found[1], found[3], repo_type="dataset", revision=found[2]))
    for name, value in build_hf_headers(library_name="fewstep").items():
        request.add_unredirected_header(name, value)
    return request


def _named(url: str) -> str:
    """An address without what may be secret in it, and what changes from day to day: a signature, a password."""
    return re.sub(r"://[^/@]*@", "://", url.partition("?")[0])[:200]
