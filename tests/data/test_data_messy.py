"""Folders as people have them: splits, links that lead nowhere, files of other programs, captions in every form."""

import base64
import io
import os
import socket
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toys.captions import picture

from fewstep.data import formats, load_data
from fewstep.data.captions import Captioned
from fewstep.data.decode import decode
from fewstep.data.sources import is_pictures, listed

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))


def pictures(root: Path, *names: str) -> Path:
    """A folder of images, number i at the i-th name."""
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(root / name)
    return root


def content(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def pixels(seed: int) -> np.ndarray:
    return np.asarray(picture(seed)).transpose(2, 0, 1)


def same(data: Any, *seeds: int) -> bool:
    return np.array_equal(data.array, [pixels(seed) for seed in seeds])


# The first folder: a data set as it is downloaded, split, classes below, in one folder of the archive.
SPLIT = ("train/cat/0.png", "train/dog/1.TIF", "train/dog/2.bmp", "test/cat/3.png", "val/dog/4.png")


@pytest.mark.parametrize("above", ["", "archive/flowers/"])
@pytest.mark.parametrize(
    "names", [{}, {"train": "Training_Set", "test": "TEST", "val": "validation"}, {"val": "valid"}]
)
def test_train_and_test_are_no_classes(tmp_path: Path, above: str, names: dict[str, str]) -> None:
    pictures(tmp_path / "x", *(above + "/".join(names.get(part, part) for part in name.split("/")) for name in SPLIT))
    said = rf"left out of .*x: the images of .*{names.get('test', 'test')} \(1\), .* is used"
    with pytest.warns(UserWarning, match=said):
        data: Any = load_data(tmp_path / "x")
    assert data.classes == ("cat", "dog")
    assert data.cond["class_labels"].tolist() == [0, 1, 1]
    assert same(data, 0, 1, 2)
    for split, seed in (("test", 3), ("val", 4), ("validation", 4)):
        with pytest.warns(UserWarning, match="left out"):
            assert same(load_data(tmp_path / "x", split=split), seed)
    assert load_data(tmp_path / "x", split="all").size == 5


def test_a_split_in_one_part_and_folders_that_are_none(tmp_path: Path) -> None:
    alone: Any = load_data(pictures(tmp_path / "a", "train/cat/0.png", "train/dog/1.png"))
    assert alone.classes == ("cat", "dog")
    trains: Any = load_data(pictures(tmp_path / "b", "train/0.png", "car/1.png", "plane/2.png"))
    assert trains.classes == ("car", "plane", "train")
    with pytest.raises(ValueError, match=r"has no folder for split test, but cat, dog"):
        load_data(tmp_path / "a" / "train", split="test")
    with pytest.raises(ValueError, match=r"no folder for split train, but test, val"):
        load_data(pictures(tmp_path / "c", "test/0.png", "val/1.png"))


@pytest.mark.parametrize(("more", "beside"), [("cat/2.png", "the folder cat"), ("2.png", "1 images")])
def test_splits_beside_something_else_are_asked_about(tmp_path: Path, more: str, beside: str) -> None:
    root = pictures(tmp_path / "x", "train/0.png", "test/1.png", more)
    with pytest.raises(ValueError, match=rf"has test, train, which look like .* beside them {beside}: say data.split"):
        load_data(root)
    with pytest.warns(UserWarning, match="left out of"):
        assert same(load_data(root, split="train"), 0)


@pytest.mark.parametrize("split", [3, ["test"], True])
def test_options_of_another_type_are_refused(tmp_path: Path, split: Any) -> None:
    for name in (pictures(tmp_path / "x", *SPLIT), saved(tmp_path / "y", {"image": [content(0)]})):
        for read in (load_data, listed, lambda name, **options: is_pictures(tmp_path / "y", options)):
            with pytest.raises(ValueError, match=r"data\.split is .*valid string"):
                read(name, split=split)
    with pytest.raises(ValueError, match="unknown split 'trian': did you mean 'train'"):
        load_data(tmp_path / "x", split="trian")


# The second: photographs as they come from a telephone and a shared disk, with everything that lies about there.
def strangers_photographs(root: Path) -> Path:
    pictures(root, "a/0.png", "a/1.jfif", "b/2.webp", "b/3.JPEG")
    for name in ("._0.png", ".DS_Store", "a/Thumbs.db", "__MACOSX/a/0.png", "a/@eaDir/0.png/thumb.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"?")
    for name in ("x.heic", "y.HEIC", "film.mp4", "readme.md", "drawing.svg", "paper.eps"):
        (root / "a" / name).write_bytes(b"?")
    os.symlink("..", root / "a" / "back")
    os.symlink(root / "b", root / "z")
    return root


def test_what_is_left_out_is_said_in_a_line(tmp_path: Path) -> None:
    root = strangers_photographs(tmp_path / "x")
    for read in (load_data, listed):
        with pytest.warns(UserWarning, match="left out of") as said:
            read(root)
        assert len(said) == 1
        line = str(said[0].message)
        assert len(line) < 400
        for part in (
            ".heic (2)",
            ".mp4 (1)",
            ".svg (1)",
            ".eps (1)",
            "Pillow does not read",
            "pip install pillow-heif",
        ):
            assert part in line
        assert "2 links to folders that are read already, such as z/" in line
        assert "DS_Store" not in line
    with pytest.warns(UserWarning, match="left out of"):
        data: Any = load_data(root)
    assert (data.size, data.classes) == (4, ("a", "b"))  # and not z, which leads to b


def test_files_that_are_none_do_not_hang(tmp_path: Path) -> None:
    root = pictures(tmp_path / "x", "0.png", "1.png")
    os.symlink("gone.png", root / "broken.png")
    os.symlink("loop.png", root / "loop.png")
    os.symlink("/dev/zero", root / "device.png")
    os.mkfifo(root / "pipe.png")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(root / "socket.png"))
    with pytest.raises(
        ValueError, match=r"broken\.png cannot be read \(it is a link to gone\.png, which is not there\)"
    ):
        load_data(root)
    with pytest.warns(UserWarning, match="5 of 7 images cannot be read"):
        assert same(load_data(root, on_error="skip"), 0, 1)
    assert [decode(root / name, None, 3) for name in ("device.png", "pipe.png", "socket.png")] == [
        "it is a device and no file", "it is a pipe and no file", "it is a socket and no file",
    ]  # fmt: skip
    assert len(listed(root).rows) == 7  # not opened before they are wanted
    with pytest.raises(ValueError, match="is no data: it is a pipe and no file"):
        load_data(root / "pipe.png")


def test_every_format_that_pillow_reads(tmp_path: Path) -> None:
    for kind in ("png", "jfif", "tif", "avif", "gif", "bmp", "webp", "jp2", "tga", "ppm", "ico", "qoi"):
        name = "JPEG" if kind == "jfif" else None
        try:
            picture(0).resize((16, 16)).save(tmp_path / f"x.{kind}", name)
        except (OSError, KeyError, ValueError):  # this Pillow cannot write it
            continue
    assert len(list(tmp_path.iterdir())) >= 8
    assert load_data(tmp_path).size == len(list(tmp_path.iterdir()))
    assert not {"EPS", "MPEG", "WMF"} & set(formats.formats())


def test_a_picture_that_another_program_would_draw_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    assert decode(tmp_path / "x.png", None, 3) == "its content is no image"


def test_heic_is_read_where_its_package_is(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = types.ModuleType("pillow_heif")
    plugin.register_heif_opener = lambda: Image.register_extension("PNG", ".heic")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    monkeypatch.setattr(Image, "EXTENSION", dict(Image.EXTENSION))
    for cached in (formats.formats, formats._suffixes):
        cached.cache_clear()
    assert formats.is_picture("x.HEIC")
    monkeypatch.undo()
    for cached in (formats.formats, formats._suffixes):
        cached.cache_clear()
    assert not formats.is_picture("x.HEIC")


def test_pixels_of_no_known_range_are_refused(tmp_path: Path) -> None:
    for name, values, why in (
        ("f", np.ones((4, 4), np.float32), "its pixels are floats"),
        ("i", np.full((4, 4), 70_000, np.int32), "whole numbers from 70000 to 70000, not of 16 bits"),
    ):
        Image.fromarray(values).save(tmp_path / f"{name}.tiff")
        assert why in str(decode(tmp_path / f"{name}.tiff", None, 3))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_pictures_lie_on_white_whatever_their_height(tmp_path: Path, mode: str, channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 256, (600, 7, 4), dtype=np.uint8)
    drawn = Image.fromarray(values).convert(mode)
    drawn.save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as opened:
        whole = Image.alpha_composite(Image.new("RGBA", opened.size, "white"), opened.convert("RGBA"))
        expected = np.asarray(whole.convert({1: "L", 3: "RGB"}[channels])).reshape(600, 7, channels)
    assert np.array_equal(decode(tmp_path / "x.png", None, channels), expected.transpose(2, 0, 1))


def test_an_animation_is_its_first_frame_and_inks_are_colours(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (4, 4), "blue"), Image.new("RGB", (4, 4), "red")
    first.save(tmp_path / "x.gif", save_all=True, append_images=[second])
    Image.new("CMYK", (4, 4), (255, 255, 0, 0)).save(tmp_path / "x.tif")
    for name in ("x.gif", "x.tif"):
        drawn = decode(tmp_path / name, None, 3)
        assert not isinstance(drawn, str)
        assert drawn[:, 0, 0].tolist() == [0, 0, 255]


# The third: a folder as trainers of adapters write it, a caption beside each image, from any operating system.
def captions(source: Captioned) -> Any:
    return source.rows.captions


def test_captions_in_files_beside_the_pictures(tmp_path: Path) -> None:
    root = pictures(tmp_path / "x", "0.png", "1.jpg", "b/2.png", "3.png")
    (root / "0.txt").write_bytes("\ufeffa cat,\r\n  on a mat\r\n".encode())
    (root / "1.caption").write_text("dog, brown, 1girl")
    (root / "b" / "2.txt").write_text("")
    (root / "notes.txt").write_text("not a caption")
    rows = listed(root).rows
    assert (rows.captions, rows.problems) == (
        ["a cat, on a mat", "dog, brown, 1girl", "", ""],
        {2: "it has no caption"},
    )
    assert [Path(name).name for name in rows.names] == ["0.png", "1.jpg", "3.png", "2.png"]
    (root / "3.txt").write_text("x")
    assert listed(root).identity != listed(root, caption="txt").identity
    assert captions(listed(root, caption="txt")) == ["a cat, on a mat", "", "x", ""]
    assert listed(root, False).rows.captions is None
    with pytest.raises(ValueError, match=r"caption: blip names a column .*\(nor metadata\.csv"):
        listed(root, caption="blip")
    (root / "3.txt").write_bytes("x".encode("utf-16"))
    with pytest.raises(ValueError, match=r"3\.txt is UTF-16: save it as UTF-8"):
        listed(root)


TABLE = 'file_name,text,more\r\n0.png,"a cat, ""red"""\r\nb/1.png,a dog,x\r\n'


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_metadata_in_csv(tmp_path: Path, mark: bytes, delimiter: str) -> None:
    root = pictures(tmp_path / "x", "0.png", "b/1.png")
    (root / "metadata.csv").write_bytes(mark + TABLE.replace(",", delimiter).encode())
    assert captions(listed(root)) == [f'a cat{delimiter} "red"', "a dog"]
    assert captions(listed(root, caption="more")) == ["", "x"]


def test_metadata_in_parquet_and_what_comes_first(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    root = pictures(tmp_path / "x", "0.png")
    parquet.write_table(
        sys.modules["pyarrow"].table({"file_name": ["0.png"], "caption": ["in parquet"]}), root / "metadata.parquet"
    )
    assert captions(listed(root)) == ["in parquet"]
    (root / "metadata.csv").write_text("file_name,text\n0.png,in csv\n")
    assert captions(listed(root)) == ["in csv"]
    (root / "metadata.jsonl").write_bytes(b'\xef\xbb\xbf{"file_name": "0.png", "text": "in jsonl"}\r\n')
    (root / "0.txt").write_text("beside it")
    assert captions(listed(root)) == ["in jsonl"]


def test_metadata_above_a_split_is_read_for_its_part(tmp_path: Path) -> None:
    root = pictures(tmp_path / "x", "train/0.png", "test/1.png", "train/2.png")
    (root / "metadata.csv").write_text("file_name,text\ntrain/2.png,two\ntest/1.png,one\ntrain/0.png,none\n")
    for split, said in ((None, ["two", "none"]), ("test", ["one"])):
        with pytest.warns(UserWarning, match="left out"):
            assert captions(listed(root, **({} if split is None else {"split": split}))) == said


@pytest.mark.parametrize(
    ("name", "bad", "said"),
    [
        ("metadata.csv", b"name,text\n0.png,a\n", r"line 2 of .*metadata\.csv is no row of a file_name"),
        ("metadata.csv", b'file_name,text\n0.png,"a" b\n', r"cannot read .*metadata\.csv: .* expected after"),
        ("metadata.csv", b"file_name,text\n0.png," + b"x" * 200_000, r"metadata\.csv: field larger than field limit"),
        ("metadata.csv", b"file_name,text\n0.png,caf\xe9\n", r"metadata\.csv is no text in UTF-8 .*: save it as UTF-8"),
        ("metadata.jsonl", '{"file_name": "0.png"}'.encode("utf-16"), r"metadata\.jsonl is UTF-16: save it as UTF-8"),
        ("metadata.jsonl", '{"file_name": "0.png"}'.encode("utf-16-le"), r"jsonl has bytes of zero, as UTF-16"),
        ("metadata.jsonl", b"[1]", r"line 1 of .* is no row"),
        ("metadata.jsonl", b'{"a":' * 50_000, r"line 1 of .* nested too deep"),
        ("metadata.parquet", b"PAR1 and no more", r"cannot read .*metadata\.parquet"),
    ],
)  # fmt: skip
def test_metadata_that_cannot_be_read(tmp_path: Path, name: str, bad: bytes, said: str) -> None:
    root = pictures(tmp_path / "x", "0.png")
    (root / name).write_bytes(bad)
    with pytest.raises(ValueError, match=said) as raised:
        listed(root)
    assert len(str(raised.value)) < 400


def test_metadata_that_is_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(pictures(tmp_path / "x", "0.png") / "metadata.jsonl")
    with pytest.raises(ValueError, match=r"metadata\.jsonl cannot be read: it is a pipe and no file"):
        listed(tmp_path / "x")


def saved(folder: Path, columns: dict[str, Any], **kinds: Any) -> Path:
    """A Hugging Face data set; columns of other types than ``datasets`` guesses have their ``kinds``."""
    table = datasets.Dataset.from_dict(columns)
    for name, kind in kinds.items():
        table = table.cast_column(name, kind)
    table.save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize(
    "cells",
    [
        [content(0), content(1)],
        [{"bytes": content(0), "path": None}, {"bytes": content(1), "path": "x.png"}],
        [base64.b64encode(content(0)).decode(), "data:image/png;base64," + base64.b64encode(content(1)).decode()],
    ],
    ids=["bytes", "dicts", "base64"],
)
def test_columns_of_pictures_that_are_not_called_so(tmp_path: Path, cells: list[Any]) -> None:
    root = saved(tmp_path / "x", {"name": ["a", "b"], "picture": cells, "text": ["one", "two"]})
    assert is_pictures(root, {})
    assert not is_pictures(root, {"image": "name"})
    assert same(load_data(root), 0, 1)
    rows = listed(root).rows
    assert rows.captions == ["one", "two"]
    assert rows.read(slice(0, 2)) == [content(0), content(1)]
    with pytest.raises(ValueError, match=r"name of .*x holds neither images nor arrays"):
        load_data(root, image="name")


def test_rows_of_bytes_that_are_no_picture(tmp_path: Path) -> None:
    root = saved(tmp_path / "x", {"image": [content(0), None, b"junk"]})
    with pytest.raises(ValueError, match=r"row 1 of .*x cannot be read \(it is empty\)"):
        load_data(root)
    with pytest.warns(UserWarning, match=r"2 of 3 images .* row 2 of .*: its content is no image"):
        assert same(load_data(root, on_error="skip"), 0)


def test_arrays_of_bytes_are_pictures(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    grey = datasets.List(datasets.List(datasets.Value("uint8")))
    data: Any = load_data(saved(tmp_path / "grey", {"x": values[..., 0].tolist()}, x=grey))
    assert data.array.dtype == np.uint8
    assert np.array_equal(data.array[:, 0], values[..., 0])
    root = saved(tmp_path / "colour", {"x": values.tolist()}, x=datasets.Array3D((5, 4, 3), "uint8"))
    with pytest.raises(ValueError, match=r"x of .*colour has shape \(2, 5, 4, 3\).* channels_last: true"):
        load_data(root)
    data = load_data(root, channels_last=True)
    assert np.array_equal(data.array, values.transpose(0, 3, 1, 2))
    assert data.rows(torch.arange(2), torch.Generator()).data.max() <= 1
    lists = saved(tmp_path / "lists", {"x": [[picture(0)], [picture(1)]]})
    with pytest.raises(ValueError, match=r"only x \(lists of Image\)"):
        load_data(lists)


def test_a_folder_in_order_says_nothing(tmp_path: Path) -> None:
    root = pictures(tmp_path / "x", "cat/0.png", "dog/1.png")
    (root / "cat" / "0.txt").write_text("a cat")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_data(root).size == 2
