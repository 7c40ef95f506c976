"""Shards behind addresses: read in order, so many at most on the disk, gone on with, and shared by processes."""

import re
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from toys.captions import CAPTIONS, picture, pipeline_folder

from fewstep.cli import main
from fewstep.data import load_data, remote
from fewstep.data.captions import Captioned
from fewstep.data.remote import Slots, described
from fewstep.data.sources import listed
from fewstep.runs.encode import encode

COUNT = len(CAPTIONS)


class Server(ThreadingHTTPServer):
    """Serves a folder, with parts of files or without, and notes what it is asked for."""

    daemon_threads = True

    def __init__(self, folder: Path, cache: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.cache, self.has_parts, self.breaks = cache, True, 0
        self.asked: Counter[str] = Counter()
        self.most = 0
        self.tokens: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, path = self.server, Path(self.translate_path(self.path.partition("?")[0]))
        server.tokens.append(self.headers.get("Authorization"))
        if self.path.startswith("/moved/"):
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{server.server_port}/{path.name}")
            self.end_headers()
            return
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        said = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (
            (int(said[1]), int(said[2] or len(content) - 1)) if said and server.has_parts else (0, len(content) - 1)
        )
        if not said or said[2] == "":  # not the question how long it is
            server.asked[path.name] += 1
            server.most = max(server.most, len(list(server.cache.glob("shards/*.shard"))))
        self.send_response(206 if said and server.has_parts else 200)
        self.send_header("ETag", f'"{hash(content)}"')
        self.send_header("Content-Length", str(last + 1 - first))
        if said and server.has_parts:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        if server.breaks and last > first:
            server.breaks -= 1
            last = first + (last - first) // 2
        with suppress(ConnectionError):
            self.wfile.write(content[first : last + 1])

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Five shards of one image each."""
    webdataset = pytest.importorskip("webdataset")
    (tmp_path / "served").mkdir()
    for i in range(COUNT):
        with webdataset.TarWriter(str(tmp_path / f"served/train-{i:03d}.tar")) as tar:
            tar.write({"__key__": f"{i:05d}", "png": picture(i), "txt": CAPTIONS[i]})
    return tmp_path / "served"


@pytest.fixture
def server(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_PAUSE", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Server(shards, tmp_path / "cache") as served:
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        yield served
        served.shutdown()


def everything(source: Captioned) -> list[bytes]:
    return [found for row in range(len(source.rows)) for found in source.rows.read(slice(row, row + 1))]


@pytest.mark.parametrize("has_parts", [True, False])
def test_rows_are_those_of_the_files_and_few_are_on_the_disk(shards: Path, server: Server, has_parts: bool) -> None:
    server.has_parts = has_parts
    here, there = listed(shards), listed(f"{server.url}/train-{{000..004}}.tar", keep=2)
    assert there.rows.captions == here.rows.captions == list(CAPTIONS)
    assert everything(there) == everything(here)
    assert there.rows.read(slice(1, 4)) == here.rows.read(slice(1, 4))
    assert 1 <= server.most <= 2
    assert len(list(server.cache.glob("shards/*.shard"))) == 2
    # Once to list, once to read; the last two of a pass are still there at the start of the next.
    before = server.asked.copy()
    again = listed(f"{server.url}/train-{{000..004}}.tar?signature=of-today", keep=2)
    assert again.identity == there.identity != here.identity
    assert (again.rows.captions, server.asked) == (there.rows.captions, before)  # what is in them was kept
    assert all(count <= 3 for count in before.values())
    Slots(server.cache / "shards", 1)
    assert len(list(server.cache.glob("shards/*.shard"))) == 1


@pytest.mark.parametrize("has_parts", [True, False])
def test_a_connection_that_breaks_is_taken_up(shards: Path, server: Server, has_parts: bool) -> None:
    server.has_parts, server.breaks = has_parts, 3
    (found,) = listed(f"{server.url}/train-001.tar").rows.read(slice(0, 1))
    assert [found] == listed(shards / "train-001.tar").rows.read(slice(0, 1))
    assert server.asked["train-001.tar"] == (4 if has_parts else 3)  # it broke as it was asked how long it is, too
    server.breaks = 99
    with pytest.raises(
        OSError, match=r"train-002\.tar could not be fetched in 5 tries \([0-9]+ of [0-9]+ bytes came\)"
    ):
        assert listed(f"{server.url}/train-002.tar").rows
    server.breaks = 0  # what half came of is not taken for it
    assert listed(f"{server.url}/train-002.tar").rows.captions == [CAPTIONS[2]]


def test_a_file_that_changes_on_the_way_is_noticed(shards: Path, server: Server) -> None:
    source = listed(f"{server.url}/train-000.tar")
    (shards / "train-000.tar").write_bytes((shards / "train-001.tar").read_bytes())
    with pytest.raises(ValueError, match=r"train-000\.tar is another file than it was at the start: start again"):
        assert source.rows
    assert listed(f"{server.url}/train-000.tar").rows.captions == [CAPTIONS[1]]


def test_many_read_at_once_within_the_bound(shards: Path, server: Server) -> None:
    urls = [f"{server.url}/train-{i:03d}.tar" for i in range(COUNT)]
    found, folder = described(urls), server.cache / "shards"

    def read(number: int) -> bool:
        with Slots(folder, 2).file(found[number % COUNT]) as file:
            return file.read_bytes() == (shards / f"train-{number % COUNT:03d}.tar").read_bytes()

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(read, range(40)))
    assert server.most <= 2


def test_encoded_by_processes_as_from_files(shards: Path, server: Server, tmp_path: Path, monkeypatch: Any) -> None:
    sd = pipeline_folder(tmp_path / "sd", "sd")
    how: dict[str, Any] = {"size": 16, "shard": 1, "batch": 2, "device": "cpu", "dtype": "float32"}
    assert encode(sd, shards, tmp_path / "one", **how) == 0
    url = f"{server.url}/train-{{000..004}}.tar"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        missing = encode(sd, url, tmp_path / "two", keep=1, **how)
    assert (missing, server.most) == (0, 1)
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / name).glob("*.safetensors")} for name in ("one", "two"))
    assert len(one) == 7  # five of images, one of captions, one of none
    assert one == two
    monkeypatch.delenv("WORLD_SIZE")
    before = server.asked.copy()
    (tmp_path / "two/latents-00003.safetensors").unlink()
    words = ["--teacher", str(sd), "--data", url, "--out", str(tmp_path / "two"), "--size", "16", "--shard", "1"]
    assert main(["encode", *words, "--batch", "2", "--device", "cpu", "--dtype", "float32", "--keep", "1"]) == 0
    assert server.asked - before == Counter({"train-003.tar": 1})  # the one that was missing
    assert (tmp_path / "two/latents-00003.safetensors").read_bytes() == one["latents-00003.safetensors"]


@pytest.mark.filterwarnings("ignore:.* of 5 images")
def test_in_buckets_a_shard_is_fetched_once_to_list_it_and_once_a_bucket(
    shards: Path, server: Server, tmp_path: Path
) -> None:
    sd = pipeline_folder(tmp_path / "sd", "sd")
    with tarfile.open(shards / "train-002.tar") as tar:
        (place,) = [member.offset_data for member in tar if member.name.endswith(".png")]
    with (shards / "train-002.tar").open("r+b") as damaged:
        damaged.seek(place)
        damaged.write(bytes(64))
    how: dict[str, Any] = {"size": 16, "buckets": True, "bucket_step": 4, "shard": 1, "on_error": "skip"}
    how |= {"batch": 2, "device": "cpu", "dtype": "float32"}
    assert encode(sd, shards, tmp_path / "one", **how) == 0
    assert encode(sd, f"{server.url}/train-{{000..004}}.tar", tmp_path / "two", keep=1, **how) == 0
    assert server.asked == Counter({f"train-{i:03d}.tar": 1 if i == 2 else 2 for i in range(COUNT)})
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / name).glob("*.safetensors")} for name in ("one", "two"))
    assert one == two
    assert len(load_data(tmp_path / "two")) == COUNT - 1


def test_the_token_of_the_hub_is_for_the_hub_alone(
    server: Server, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub sends to another host, which is not to see it."""
    import huggingface_hub

    asked: list[tuple[Any, ...]] = []

    def place(repo: str, file: str, *, repo_type: str, revision: str | None) -> str:
        asked.append((repo, file, repo_type, revision))
        return f"{server.url}/moved/{file}"

    monkeypatch.setattr(huggingface_hub, "hf_hub_url", place)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^hf://datasets/some/set/x\.tar is on the .* hub, and HF_HUB_OFFLINE says"):
        listed("hf://datasets/some/set/x.tar")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    source = listed("hf://datasets/some/set@v1/train-{000..001}.tar")
    assert source.rows.captions == list(CAPTIONS[:2])
    assert asked[0] == ("some/set", "train-000.tar", "dataset", "v1")
    assert {*server.tokens} == {"Bearer hf_secret", None}
    assert server.tokens[0] == "Bearer hf_secret"
    assert server.tokens.count("Bearer hf_secret") == server.tokens.count(None)  # half of them are sent on


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pipe:curl -s https://host/x.tar", "'pipe:curl -s https://host/x.tar' is a command, and none is run"),
        (
            "s3://bucket/x.tar",
            "'s3://bucket/x.tar': shards are read from http://, https:// and hf://datasets/ addresses",
        ),
        ("file:///etc/passwd", "'file:///etc/passwd': shards are read from http://"),
        ("http://127.0.0.1:9/x.tar?key=secret", "http://127.0.0.1:9/x.tar cannot be reached"),
        ("https://host/{0..999999}.tar", "stands for more than 100,000 shards"),
        ("hf://datasets/only/", "hf://datasets/only/ names no file of a data set"),
    ],
)
def test_addresses_that_cannot_be(name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sd = pipeline_folder(tmp_path / "sd", "sd")
    capsys.readouterr()
    assert main(["encode", "--teacher", str(sd), "--data", name, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert "secret" not in error
    assert not (tmp_path / "out").exists()


def test_no_such_shard_and_models_of_pixels(server: Server) -> None:
    with pytest.raises(FileNotFoundError, match=r"no shard http://.*/train-009\.tar: its server says 404"):
        listed(f"{server.url}/train-009.tar?signature=x")
    with pytest.raises(ValueError, match=r"train-000\.tar: webdataset shards are for latent models"):
        load_data(f"{server.url}/train-000.tar")
    with pytest.raises(ValueError, match=r"^keep is 0: one shard has to be on the disk"):
        listed(f"{server.url}/train-000.tar", keep=0)
