"""Sources of images with captions: what they list, by what they are known, and what they refuse."""

import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from toys.captions import CAPTIONS, captioned_folder, picture

from fewstep.data import load_data
from fewstep.data.captions import Captioned
from fewstep.data.sources import is_pictures, listed


def pixels(source: Any) -> bytes:
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
        return opened.convert("RGB").tobytes()


def everything(source: Captioned) -> list[bytes]:
    rows = source.rows
    return [pixels(one) for one in [*rows.read(slice(0, 2)), *rows.read(slice(2, len(rows)))]]


def test_a_folder_with_captions(tmp_path: Path) -> None:
    rows = listed(captioned_folder(tmp_path / "photos")).rows
    assert rows.captions == list(CAPTIONS)
    assert (rows.labels, rows.classes, rows.problems) == (None, (), {})
    assert [Path(name).name for name in rows.names] == [f"{i}.png" for i in range(5)]
    assert everything(listed(tmp_path / "photos")) == [picture(i).tobytes() for i in range(5)]


def test_the_rows_are_those_of_the_metadata_in_each_sub_folder(tmp_path: Path) -> None:
    captioned_folder(tmp_path / "photos" / "a", ["one", "two"])
    captioned_folder(tmp_path / "photos" / "b" / "c", ["three"], column="caption")
    picture(9).save(tmp_path / "photos" / "unlisted.png")
    with pytest.warns(UserWarning, match=r"1 images such as unlisted\.png .* named in no metadata\.jsonl and left out"):
        rows = listed(tmp_path / "photos").rows
    assert rows.captions == ["one", "two", "three"]
    assert [Path(name).relative_to(tmp_path / "photos").as_posix() for name in rows.names] == [
        "a/0.png", "a/1.png", "b/c/0.png",
    ]  # fmt: skip


def test_the_column_is_named_or_found(tmp_path: Path) -> None:
    captioned_folder(tmp_path / "photos", ["x"], column="blip")
    with pytest.raises(ValueError, match=r"has no caption \(text, caption, prompt\), only file_name, blip"):
        listed(tmp_path / "photos")
    with pytest.raises(ValueError, match=r"unknown column of .* 'blib': did you mean 'blip'\?"):
        listed(tmp_path / "photos", caption="blib")
    assert listed(tmp_path / "photos", caption="blip").rows.captions == ["x"]


@pytest.mark.parametrize(
    ("line", "error", "said"),
    [
        ("{", ValueError, "line 2 of .* is not JSON"),
        ("[" * 100_000, ValueError, "line 2 of .* is not JSON .its brackets are nested too deep"),
        ('{"text": "x"}', ValueError, "line 2 of .* is no row"),
        ('{"file_name": "../x.png", "text": "x"}', ValueError, r"file_name \.\./x\.png is not beside metadata\.jsonl"),
        ('{"file_name": "/x.png", "text": "x"}', ValueError, "is not beside"),
    ],
)
def test_lines_that_cannot_be(tmp_path: Path, line: str, error: type[Exception], said: str) -> None:
    folder = captioned_folder(tmp_path / "photos", ["x"])
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(error, match=said):
        listed(folder)


def test_a_row_without_caption_is_a_problem(tmp_path: Path) -> None:
    rows = listed(captioned_folder(tmp_path / "photos", ["x", None, "y"])).rows
    assert rows.captions == ["x", "", "y"]
    assert rows.problems == {1: "it has no caption"}


def test_sub_folders_are_classes_where_there_are_no_captions(tmp_path: Path) -> None:
    for i, name in enumerate(("cat", "dog", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        picture(i).save(tmp_path / "photos" / name / f"{i}.png")
    rows = listed(tmp_path / "photos").rows
    assert (rows.captions, rows.labels, rows.classes) == (None, [0, 1, 1], ("cat", "dog"))
    assert listed(tmp_path / "photos", labels=False).rows.labels is None
    with pytest.raises(ValueError, match=r"caption: text names a column of metadata.jsonl, and there is none"):
        listed(tmp_path / "photos", caption="text")


def test_a_picture_that_is_named_and_not_there_is_a_problem(tmp_path: Path) -> None:
    folder = captioned_folder(tmp_path / "photos", ["x"])
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "gone.png", "text": "x"}')
    problems = listed(folder).rows.problems
    assert list(problems) == [1]
    assert re.search(r"line 2 of .*metadata\.jsonl: there is no such file", problems[1])


def test_what_a_source_is_known_by(tmp_path: Path) -> None:
    folder = captioned_folder(tmp_path / "photos")
    first = listed(folder).identity
    assert listed(folder).identity == first
    assert listed(shutil.copytree(folder, tmp_path / "elsewhere")).identity == first
    lines = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(lines.replace("a dog", "a dig"))
    second = listed(folder).identity
    os.utime(folder / "3.png", ns=(1, 1))
    assert len({first, second, listed(folder).identity}) == 3


def test_a_hugging_face_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"photo": [picture(i) for i in range(3)], "said": ["a", "b", "c"], "kind": [1, 0, 1]}
    features = datasets.Features(
        {
            "photo": datasets.Image(),
            "said": datasets.Value("string"),
            "kind": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    source = listed(tmp_path / "saved")
    assert source.rows.captions == ["a", "b", "c"]  # the only column of text
    assert (source.rows.labels, source.rows.classes) == ([1, 0, 1], ("cat", "dog"))
    assert everything(source) == [picture(i).tobytes() for i in range(3)]
    assert listed(tmp_path / "saved").identity == source.identity
    assert listed(tmp_path / "saved", caption="said", labels=False).identity != source.identity
    with pytest.raises(ValueError, match=r"unknown column of .* 'sad'"):
        listed(tmp_path / "saved", caption="sad")
    with pytest.raises(ValueError, match=r"has no column of images said, only photo \(Image\)"):
        listed(tmp_path / "saved", image="said")
    datasets.Dataset.from_dict({"x": [1.0]}).save_to_disk(str(tmp_path / "numbers"))
    assert is_pictures(tmp_path / "saved", {})
    assert not is_pictures(tmp_path / "numbers", {})


def test_captions_and_labels_are_read_without_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    kinds = {
        "image": datasets.Image(),
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["a", "b"]),
    }
    rows = {
        "image": [picture(0), {"bytes": b"broken", "path": None}, picture(2)],
        "text": list("xyz"),
        "label": [1, 0, 1],
    }
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).save_to_disk(str(tmp_path / "saved"))
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("an image is decoded"))
    found = listed(tmp_path / "saved").rows
    assert (found.captions, found.labels) == (["x", "y", "z"], [1, 0, 1])
    assert found.read(slice(1, 2)) == [b"broken"]
    with pytest.raises(ValueError, match=r"row 1 of .*saved cannot be read"):
        load_data(tmp_path / "saved")
    with pytest.warns(UserWarning, match="1 of 3"):
        data: Any = load_data(tmp_path / "saved", on_error="skip")
    assert data.cond["class_labels"].tolist() == [1, 1]


def test_captions_that_are_not_wanted_are_not_read(tmp_path: Path) -> None:
    for source in (captioned_folder(tmp_path / "photos", ["x", None], column="blip"), shards(tmp_path / "shards")):
        found = listed(source, False).rows
        assert (found.captions, found.problems) == (None, {})
    with pytest.raises(ValueError, match=r"unknown option of .* 'captions'"):
        listed(tmp_path / "photos", captions=False)


def shards(folder: Path) -> Path:
    """Two shards as the webdataset library writes them."""
    webdataset = pytest.importorskip("webdataset")
    folder.mkdir()
    for shard, rows in ((0, (0, 1)), (1, (2,))):
        with webdataset.TarWriter(str(folder / f"train-{shard:03d}.tar")) as tar:
            for i in rows:
                said = {"txt": CAPTIONS[i], "json": {"blip": f"blip {i}"}, "cls": i % 2}
                tar.write({"__key__": f"some/{i:05d}", "png": picture(i), **said})
    return folder


def test_webdataset_shards(tmp_path: Path) -> None:
    folder = shards(tmp_path / "shards")
    source = listed(folder)
    assert source.rows.captions == list(CAPTIONS[:3])
    assert source.rows.labels == [0, 1, 0]
    assert everything(source) == [picture(i).tobytes() for i in range(3)]
    for pattern in ("train-{000..001}.tar", "train-*.tar", "train-{000,001}.tar"):
        assert listed(folder / pattern).identity == source.identity
        assert listed(folder / pattern).rows.names == source.rows.names
    assert listed(folder / "train-001.tar").rows.captions == [CAPTIONS[2]]
    assert listed(folder, caption="blip").rows.captions == ["blip 0", "blip 1", "blip 2"]
    assert listed(folder, caption="blip").identity != source.identity
    assert source.rows.names[2].startswith("some/00002 in ")


def test_captions_in_json_alone(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in (("0.png", b"?"), ("0.json", json.dumps({"caption": "a cat"}).encode())):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert listed(tmp_path / "x.tar").rows.captions == ["a cat"]
    assert listed(tmp_path / "x.tar").rows.read(slice(0, 1)) == [b"?"]


def test_shards_that_cannot_be_read(tmp_path: Path) -> None:
    folder = shards(tmp_path / "shards")
    with pytest.raises(FileNotFoundError, match=r"no shard .*train-002\.tar: shards are files here"):
        listed(folder / "train-{000..002}.tar")
    whole = (folder / "train-000.tar").read_bytes()
    (folder / "train-000.tar").write_bytes(whole[:1500])
    with pytest.raises(ValueError, match=r"train-000\.tar cannot be read .*damaged, or compressed"):
        assert listed(folder).rows
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(ValueError, match=r"no images \(\.png, .*empty\.tar"):
        assert listed(tmp_path / "empty.tar").rows


def test_shards_for_a_model_of_pixels_are_to_be_unpacked(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train-000.tar", "w"):
        pass
    for name in (tmp_path, tmp_path / "train-000.tar", tmp_path / "train-{000..009}.tar", "train-*.tar"):
        said = f"^{re.escape(str(name))}: webdataset shards are for latent models, .* unpack them into a folder"
        with pytest.raises(ValueError, match=said):
            load_data(name)


def test_what_is_no_source(tmp_path: Path) -> None:
    captioned_folder(tmp_path / "photos")
    with pytest.raises(ValueError, match=r"unknown option of .* 'captain': did you mean 'caption'\?"):
        listed(tmp_path / "photos", captain="x")
    with pytest.raises(ValueError, match=r"unknown option of .* 'bucket': did you mean 'buckets'\?"):
        listed(tmp_path / "photos", bucket=True)
    for option, kind in (("keep", "webdataset shards"), ("image", "a Hugging Face data set")):
        said = f"^{option} is an option of {kind}, and .*photos is a folder of images: leave it out$"
        with pytest.raises(ValueError, match=said):
            listed(tmp_path / "photos", **{option: 2})
    with pytest.raises(FileNotFoundError, match=r"no data at .*gone"):
        listed(tmp_path / "gone")
    with pytest.raises(ValueError, match="digits is no data of images that can be encoded"):
        listed("digits")
