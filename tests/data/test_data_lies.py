"""Files whose headers lie, whose brackets never close, or which unfold to more than any memory: refused in a line that
names the file, in under a second and with little memory."""

import gzip
import io
import json
import os
import struct
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys.captions import picture

from fewstep.common import reading
from fewstep.common.options import read_yaml
from fewstep.data import encoded, load_data, pairs, texts
from fewstep.data.decode import decode
from fewstep.data.sources import listed
from fewstep.flows.exact import CheckerboardField
from fewstep.generation.requests import read_lines
from fewstep.generation.teacher_samples import TeacherSamples


def header(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def npz(path: Path, content: bytes, declared: int | None = None) -> Path:
    """An archive with one array; its directory may declare another size than it has."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", content)
    if declared is not None:
        sizes = struct.pack("<II", len(content), len(content))
        path.write_bytes(path.read_bytes().replace(sizes, struct.pack("<II", len(content), declared)))
    return path


def tar(path: Path, size: int, name: str = "0.png") -> Path:
    """A shard with one member that declares a size."""
    info = tarfile.TarInfo(name)
    info.size = size
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    return path


def idx(*sides: int) -> bytes:
    return struct.pack(f">BBBB{len(sides)}I", 0, 0, 8, len(sides), *sides)


def png(width: int, height: int, kind: int = 2) -> bytes:
    """An image that declares width x height pixels, RGB or of another kind of PNG's, and has few bytes of them."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + size + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


HUGE = 10**11
CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "npy": (lambda d: load_data(write(d / "x.npy", header((HUGE, 4)) + bytes(99))), r"x\.npy"),
    "npy-beyond": (lambda d: load_data(write(d / "x.npy", header((10**30, 4)))), r"x\.npy"),
    "npy-negative": (lambda d: load_data(write(d / "x.npy", header((-5, 4)))), r"x\.npy"),
    "npy-brackets": (
        lambda d: load_data(write(d / "x.npy", b"\x93NUMPY\1\0" + struct.pack("<H", 9000) + b"(" * 9000)), r"x\.npy"
    ),
    "npz": (lambda d: load_data(npz(d / "x.npz", header((HUGE, 4)) + bytes(99))), r"x in .*x\.npz: it declares"),
    "npz-twice": (
        lambda d: load_data(npz(d / "x.npz", header((2**27, 8)), len(header((2**27, 8))) + 2**32 - 1024)), r"x\.npz"
    ),
    "npz-of-zeros": (lambda d: load_data(write(d / "x.npz", bytes(1000))), r"x\.npz as a NumPy array"),
    "idx": (lambda d: load_data(write(d / "x-idx3", idx(2**32 - 1, 2**32 - 1, 4))), r"x-idx3 is damaged: exp"),
    "idx-gz": (lambda d: load_data(write(d / "x-idx3", gzip.compress(idx(2**31, 4, 4)))), r"x-idx3 is damaged: exp"),
    "idx-bomb": (
        lambda d: load_data(write(d / "x-idx3", gzip.compress(idx(1, 4, 4) + bytes(10**8)))), r"x-idx3 .* it has more"
    ),
    "idx-axes": (lambda d: load_data(write(d / "x-idx3", b"\0\0\x08\xff" + b"\xff" * 1020)), r"x-idx3 is no IDX file"),
    "tar": (lambda d: listed(tar(d / "x.tar", HUGE)).rows, r"x\.tar cannot be read \('0\.png' should have 1000000"),
    "tar-caption": (lambda d: listed(tar(d / "x.tar", HUGE, "0.txt")).rows, r"x\.tar"),
    "tar-names": (lambda d: listed(d / "x{0..9999999}.tar"), r"no shard .*x0\.tar: .* \(there is no such file\)"),
    "tar-names-squared": (lambda d: listed(d / "x{0..9999999}{0..9999999}.tar"), r"no shard .*x00\.tar"),
    "tar-no-names": (lambda d: listed(d / "x{9..0}.tar"), r"stands for no shard: ranges run upwards"),
    "tar-many-braces": (lambda d: listed(f"x{'{0..9}' * 2000}.tar"), "more than 16 pairs of braces"),
    "prompts": (lambda d: read_lines(write(d / "x.jsonl", b"[" * 10**6)), r"x\.jsonl, line 1 .* nested too deep"),
    "prompts-utf16": (lambda d: read_lines(write(d / "x.txt", "cat".encode("utf-16"))), r"x\.txt is UTF-16: save it"),
    "recipe-utf16": (lambda d: read_yaml(write(d / "x.yaml", "a: 1".encode("utf-16"))), r"x\.yaml is UTF-16: save it"),
    "device": (lambda d: load_data("/dev/zero"), "is no data: it is a device"),
    "long-name": (lambda d: load_data("/x" * 9000), "no data at /x/x"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_lies_is_refused_at_once(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt, said = CASES[case]
    monkeypatch.chdir(tmp_path)
    load_data("checkerboard")  # whatever is imported first
    if case == "idx-bomb":
        attempt = with_the_file_there(attempt, tmp_path)
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises((ValueError, FileNotFoundError), match=said) as raised:
            attempt(tmp_path)
        assert time.process_time() - start < 5  # under a second on an idle machine
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 400


def with_the_file_there(attempt: Callable[[Path], Any], folder: Path) -> Callable[[Path], Any]:
    """Makes the file before memory is measured."""
    with pytest.raises(ValueError, match="damaged"):
        attempt(folder)
    return lambda d: load_data(d / "x-idx3")


def test_pictures_of_too_many_pixels_are_not_decoded(tmp_path: Path) -> None:
    for side, why in ((12_000, "it has 12000 x 12000 pixels"), (50_000, "exceeds limit")):
        assert why in str(decode(write(tmp_path / "x.png", png(side, side)), 32, 3))
    assert "more than 33,554,432 are not decoded" in str(decode(write(tmp_path / "x.png", png(8000, 8000, 6)), 32, 3))
    assert "truncated" in str(decode(write(tmp_path / "x.png", png(8000, 8000)), 32, 3))


def test_what_takes_more_memory_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    reading.check_memory("x", 1000, "")
    with pytest.raises(ValueError, match=r"x takes 1e\+06 GB of memory, and the machine has .*: save it otherwise"):
        reading.check_memory("x", 10**15, "save it otherwise")


def test_numbers_that_are_none(tmp_path: Path) -> None:
    kinds: list[tuple[Any, str]] = [
        ("complex64", "give real and imaginary parts as channels"),
        ([("a", "f4"), ("b", "i4")], "give one of its fields"),
        ("M8[s]", "give times as numbers"),
        ("S3", r"dtype \|S3"),
    ]
    for dtype, said in kinds:
        np.save(tmp_path / "x.npy", np.zeros((4, 2), dtype))
        with pytest.raises(
            ValueError, match=rf"x\.npy has dtype .* no array of real numbers.*{said}|x\.npy has {said}"
        ):
            load_data(tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("value", "said"), [(1e300, r"too large for float32, the first, 1e\+300,"), (np.nan, "not finite")]
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_numbers_that_float32_cannot_hold(tmp_path: Path, value: float, said: str, order: Any) -> None:
    values = np.zeros((6, 3), order=order)
    values[4, 1] = value
    np.save(tmp_path / "x.npy", values)
    np.savez(tmp_path / "x.npz", data=np.zeros((6, 3)), angle=values)
    with pytest.raises(ValueError, match=rf"x\.npy has 1 values that are {said}.* in row 4 of 6"):
        load_data(tmp_path / "x.npy")
    with pytest.raises(
        ValueError, match=rf"condition 'angle' of data in .*x\.npz has 1 values that are {said}.* row 4"
    ):
        load_data(tmp_path / "x.npz", key="data", conditions=["angle"])


def test_large_numbers_are_normalized_or_refused(tmp_path: Path) -> None:
    values = 1e60 * np.random.default_rng(0).normal(size=(50, 2))
    np.save(tmp_path / "x.npy", values)
    data: Any = load_data(tmp_path / "x.npy", normalize=True)
    assert data.std == pytest.approx(values.std())
    np.save(tmp_path / "x.npy", 1e240 * values)
    with pytest.raises(ValueError, match=r"x\.npy are too large for a standard deviation"):
        load_data(tmp_path / "x.npy", normalize=True)


def test_labels_beyond_int64(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", data=np.zeros((2, 2)), labels=np.array([0, 2**64 - 1], np.uint64))
    with pytest.raises(ValueError, match=r"class_labels' of data in .*x\.npz has the value 18446744073709551615"):
        load_data(tmp_path / "x.npz")


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_npy(tmp_path: Path, version: tuple[int, int]) -> None:
    values = np.asfortranarray(np.arange(6.0).reshape(3, 2))
    with (tmp_path / "x.npy").open("wb") as file:
        np.lib.format.write_array(file, values, version)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "x.npy", "x.npy")
    for name in ("x.npy", "x.npz"):
        data: Any = load_data(tmp_path / name)
        assert np.array_equal(data.array, values)


def drawn(file: Path, count: int = 6) -> TeacherSamples:
    return TeacherSamples(CheckerboardField(), count, steps=1, shape=(2,), file=file)


def test_samples_of_a_teacher_that_are_damaged_say_how_to_draw_them_anew(tmp_path: Path) -> None:
    file = tmp_path / "teacher-samples.npz"
    first = drawn(file)._array.array.copy()
    assert np.array_equal(drawn(file)._array.array, first)
    anew = r"Remove teacher-samples\.npz, and the samples are drawn anew"
    with pytest.raises(ValueError, match=rf"has 6 samples of \(2,\), not 7 of \(2,\)\. {anew}"):
        drawn(file, 7)._array  # noqa: B018
    whole = file.read_bytes()
    os.truncate(file, len(whole) // 2)
    with pytest.raises(ValueError, match=rf"cannot read .*teacher-samples\.npz.*{anew}"):
        drawn(file)._array  # noqa: B018
    for damaged in (b"", b"PK", bytes(100), whole[:60] + b"\xff" * 60 + whole[120:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=anew):
            drawn(file)._array  # noqa: B018
    np.savez(file, other=np.zeros(3))
    with pytest.raises(ValueError, match=anew):
        drawn(file)._array  # noqa: B018


def test_captions_of_a_shard_in_other_encodings(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as shard:
        texts = ["a cat".encode("utf-8-sig"), "a dog".encode("utf-16"), "a caf\xe9".encode("latin-1")]
        for i, text in enumerate(texts):
            for kind, content in (("png", b"?"), ("txt", text)):
                info = tarfile.TarInfo(f"{i}.{kind}")
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))
    rows = listed(tmp_path / "x.tar").rows
    assert rows.captions == ["a cat", "", "a caf\ufffd"]
    assert rows.problems == {1: "it has no caption"}


def test_a_silhouette_of_what_is_no_picture(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.png cannot be read as an image: it is a pipe"):
        load_data("silhouette", image=str(tmp_path / "x.png"))
    with pytest.raises(ValueError, match=r"gone\.png cannot be read as an image: there is no such file"):
        load_data("silhouette", image=str(tmp_path / "gone.png"))


def test_odd_names_in_a_shard_are_only_names(tmp_path: Path) -> None:
    file = io.BytesIO()
    picture(0).save(file, "PNG")
    with tarfile.open(tmp_path / "x.tar", "w") as shard:
        for name in ("../../etc/0.png", "/abs/1.PNG", "._2.png", "a\nb.png"):
            info = tarfile.TarInfo(name)
            info.size = len(file.getvalue())
            shard.addfile(info, io.BytesIO(file.getvalue()))
    rows = listed(tmp_path / "x.tar").rows
    assert [name.partition(" in ")[0] for name in rows.names] == ["../../etc/0", "abs/1", "a\nb"]
    assert rows.read(slice(0, 3)) == [file.getvalue()] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.tar"]


FACTS = {"format": 1, "shape": [2], "labels": None, "command": "x", "count": 4, "shard": 2}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shape": 3}, "has shape: 3, which cannot be"),
        ({"shape": [2, -1]}, "has shape"),
        ({"count": 0}, "has count: 0"),
        ({"count": "4"}, "has count: '4'"),
        ({"shard": 0}, "has shard: 0"),
        ({"shard": True}, "has shard: True"),
        ({"command": None}, "has command: None"),
        ({"format": [1] * 1000}, "has format"),
        ({"labels": "cat"}, "has labels: 'cat'"),
        ({"text": {}}, "has text"),
        ({"vae": 3}, "has vae: 3"),
        ({"count": 1 << 31}, "has more than 100,000 shards"),
    ],
)
def test_facts_that_cannot_be(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    for read, name in ((pairs.read_facts, pairs.FACTS), (encoded.read_facts, encoded.FACTS)):
        (tmp_path / name).write_text(json.dumps(FACTS))
        assert read(tmp_path) == FACTS
        (tmp_path / name).write_text(json.dumps(FACTS | change))
        with pytest.raises(ValueError, match=rf"{name} {said}.*anew") as raised:
            read(tmp_path)
        assert len(str(raised.value)) < 400
        for key in change.keys() & {"shape", "command"}:
            (tmp_path / name).write_text(json.dumps({k: v for k, v in FACTS.items() if k != key}))
            with pytest.raises(ValueError, match=f"{name} says nothing of {key}"):
                read(tmp_path)
        (tmp_path / name).write_text("[1]")
        with pytest.raises(ValueError, match=f"{name} is no mapping of facts"):
            read(tmp_path)


NOTE = {"rows": 3, "bytes": 10, "sha256": "0"}


@pytest.mark.parametrize(
    "index",
    [
        [1],
        {"latents-0": 3},
        {"latents-0": {**NOTE, "rows": -1}},
        {"latents-0": {**NOTE, "bytes": "10"}},
        {"../latents-0": NOTE},
        {"/etc/passwd": NOTE, "latents-0": NOTE},
        {},
        {"text-0": NOTE},
    ],
)
def test_an_index_names_shards_of_its_folder_alone(tmp_path: Path, index: Any) -> None:
    (tmp_path / encoded.INDEX).write_text(json.dumps({"latents-0": NOTE, "text-0": NOTE}))
    assert list(encoded.read_index(tmp_path)) == ["latents-0", "text-0"]
    (tmp_path / encoded.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json is damaged: "):
        encoded.read_index(tmp_path)
    (tmp_path / texts.TEXTS).write_text(json.dumps({"count": 3, "shard": 0}))
    with pytest.raises(ValueError, match=r"texts\.json is damaged: it has no count and shard"):
        texts.read_texts(tmp_path)
    (tmp_path / texts.TEXTS).write_text(json.dumps({"count": 1 << 31, "shard": 1}))
    with pytest.raises(ValueError, match=r"texts\.json is damaged: it has more than 100,000 shards"):
        texts.read_texts(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("labels", True), ("labels", [-1]), ("labels", ["a"]), ("prompts", 3)])
def test_facts_of_pairs_that_cannot_be(key: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / pairs.FACTS).write_text(json.dumps(FACTS | {key: value}))
    with pytest.raises(ValueError, match=rf"{pairs.FACTS} has {key}: .*, which cannot be"):
        pairs.read_facts(tmp_path)
