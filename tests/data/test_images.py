"""Folders of images and Hugging Face data sets: decoded once, whole, and with a word on what is wrong."""

import json
import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.data import decode, load_data
from fewstep.data.images import image_folder

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def random_picture(seed, width=6, height=5, channels=3):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze())


def save(picture, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path


def pixels_of(picture):
    return np.array(picture).transpose(2, 0, 1)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    for i in range(5):
        save(random_picture(i), root / f"{i}.png")
    return root


def test_pictures_in_order_of_name_whatever_their_depth(folder):
    save(random_picture(7), folder / "3extra" / "deep" / "x.BMP")
    data = load_data(folder)
    assert (data.size, data.shape) == (6, (3, 5, 6))
    for row, seed in enumerate([0, 1, 2, 3, 7, 4]):
        assert np.array_equal(data.array[row], pixels_of(random_picture(seed)))
    batch = data.rows(torch.tensor([4]), torch.Generator())
    assert not batch.cond
    assert torch.equal(data.denormalize(batch.data)[0].round().byte(), torch.from_numpy(pixels_of(random_picture(7))))


def test_more_than_one_part_of_pictures_keeps_the_order(tmp_path):
    for i in range(300):
        save(Image.new("L", (2, 2), i % 256), tmp_path / "many" / f"{i:03}.png")
    data = image_folder(tmp_path / "many", channels=1)
    assert data.array[:, 0, 0, 0].tolist() == [i % 256 for i in range(300)]


def test_decoded_once_and_again_when_a_file_changes(folder, monkeypatch):
    first = image_folder(folder).array.copy()
    calls = []
    real = decode.decode
    monkeypatch.setattr(decode, "decode", lambda *args: calls.append(args) or real(*args))
    assert np.array_equal(image_folder(folder).array, first)
    assert not calls
    image_folder(folder, size=4)
    assert len(calls) == 5
    random_picture(50).save(folder / "2.png")
    os.utime(folder / "2.png", ns=(1, 1))
    assert np.array_equal(image_folder(folder).array[2], pixels_of(random_picture(50)))
    assert len(calls) == 10


def test_the_cache_is_mapped_and_nothing_is_left_aside(folder, cache):
    data = image_folder(folder)
    assert isinstance(data.array.base, np.memmap)
    (entry,) = (cache / "pictures").iterdir()
    assert sorted(f.name for f in entry.iterdir()) == ["pixels.npy", "skipped.json"]


def test_two_processes_at_once_share_what_the_first_wrote(folder, cache, monkeypatch):
    real = decode._decode_all

    def beaten(*args):
        monkeypatch.setattr(decode, "_decode_all", real)
        image_folder(folder)  # the other process is done while this one still decodes
        return real(*args)

    monkeypatch.setattr(decode, "_decode_all", beaten)
    assert image_folder(folder).size == 5
    assert len(list((cache / "pictures").iterdir())) == 1


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(folder, cache, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(decode, "_write_header", full)
    with pytest.raises(OSError, match=r"could not write .*pictures.*the disk is full.*FEWSTEP_CACHE"):
        image_folder(folder)
    assert list((cache / "pictures").iterdir()) == []


def test_sub_folders_are_classes(tmp_path):
    for seed, name in enumerate(["cat/b.png", "ant/x/y.png", "cat/a.png"]):
        save(random_picture(seed), tmp_path / "pets" / name)
    data = load_data(tmp_path / "pets")
    assert data.classes == ("ant", "cat")
    batch = data.rows(torch.arange(3), torch.Generator())
    assert batch.cond["class_labels"].tolist() == [0, 1, 1]
    assert not image_folder(tmp_path / "pets", labels=False).cond


def test_folders_that_are_numbers_count_as_such(tmp_path):
    for i in range(11):
        save(random_picture(i), tmp_path / "numbers" / str(i) / "x.png")
    data = image_folder(tmp_path / "numbers")
    assert data.classes == tuple(map(str, range(11)))
    assert data.cond["class_labels"].sort().values.tolist() == list(range(11))
    assert np.array_equal(data.array[data.cond["class_labels"].tolist().index(10)], pixels_of(random_picture(10)))


def test_one_sub_folder_is_no_class_and_loose_pictures_are_told(folder):
    save(random_picture(8), folder / "a" / "x.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not image_folder(folder).cond
    save(random_picture(9), folder / "b" / "x.png")
    with pytest.warns(UserWarning, match=r"5 images such as 0\.png lie beside the 2 sub-folders"):
        assert not image_folder(folder).cond


def test_size_cuts_the_middle_and_averages(tmp_path):
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = 200
    pixels[:16, 32:64, 0] = np.indices((16, 32)).sum(0) % 2 * 255  # a fine pattern must become grey, not alias
    save(Image.fromarray(pixels), tmp_path / "wide" / "a.png")
    data = image_folder(tmp_path / "wide", size=8)
    assert data.shape == (3, 8, 8)
    middle = data.array[0, :, :, 2:6].astype(int)  # Lanczos looks a little beyond the cut
    assert np.abs(middle[1] - 200).max() <= 1
    assert np.abs(middle[0, 1:3] - 127).max() <= 5


@pytest.mark.parametrize(("mode", "value", "expected"), [("L", 90, 90), ("1", 1, 255), ("I;16", 40000, 156)])
def test_grey_pictures(tmp_path, mode, value, expected):
    save(Image.new(mode, (4, 4), value), tmp_path / "grey" / "a.png")
    assert (image_folder(tmp_path / "grey").array == expected).all()
    grey = image_folder(tmp_path / "grey", channels=1)
    assert grey.shape == (1, 4, 4)
    assert (grey.array == expected).all()


def test_transparent_pictures_lie_on_white_or_stay(tmp_path):
    save(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), tmp_path / "clear" / "a.webp")
    assert (image_folder(tmp_path / "clear").array == 255).all()
    kept = image_folder(tmp_path / "clear", channels=4)
    assert kept.shape == (4, 4, 4)
    assert (kept.array[0, 3] == 0).all()


def test_photographs_are_turned_as_their_camera_noted(tmp_path):
    picture = Image.new("RGB", (8, 4), "black")
    picture.paste("white", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise to see it
    (tmp_path / "camera").mkdir()
    picture.save(tmp_path / "camera" / "a.jpg", exif=exif, quality=100)
    data = image_folder(tmp_path / "camera")
    assert data.shape == (3, 8, 4)
    assert data.array[0, :, :3].min() > 250
    assert data.array[0, :, 5:].max() < 5


def test_a_large_photograph_decoded_small_keeps_its_detail(tmp_path):
    drawn = random_picture(0, width=40, height=40, channels=1).resize((320, 320), Image.Resampling.BICUBIC)
    (tmp_path / "large").mkdir()
    drawn.save(tmp_path / "large" / "a.jpg", quality=95)
    shrunk = image_folder(tmp_path / "large", size=80, channels=1).array[0, 0].astype(int)
    assert np.abs(shrunk - np.asarray(drawn.resize((80, 80), Image.Resampling.LANCZOS))).max() < 12


def test_mixed_sizes_name_two_and_the_way_out(folder):
    save(random_picture(9, width=7, height=9), folder / "3.png")
    with pytest.raises(ValueError, match=r"0\.png is 6 x 5, .*3\.png is 7 x 9: say --data\.size 64"):
        image_folder(folder)
    assert image_folder(folder, size=4).size == 5


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"not an image", lambda b: b""])
def test_a_corrupt_picture_is_named_or_left_out(folder, damage):
    for name in ("a/x.png", "b/y.png"):
        save(random_picture(20), folder / name)
    for loose in folder.glob("*.png"):
        loose.rename(folder / "a" / loose.name)
    bad = folder / "a" / "3.png"
    bad.write_bytes(damage(bad.read_bytes()))
    with pytest.raises(ValueError, match=r"a/3\.png cannot be read .* on_error: skip"):
        image_folder(folder)
    for _ in range(2):  # decoded, then from the cache
        with pytest.warns(UserWarning, match=r"1 of 7 images cannot be read and are left out .*a/3\.png"):
            data = image_folder(folder, on_error="skip")
        assert data.size == 6
        assert data.array.shape == (6, 3, 5, 6)
        assert np.array_equal(data.array[3], pixels_of(random_picture(4)))
        assert data.cond["class_labels"].tolist() == [0, 0, 0, 0, 0, 1]
    with pytest.raises(ValueError, match=r"a/3\.png cannot be read"):  # what skip left in the cache does not hide it
        image_folder(folder)


def test_the_first_picture_may_be_the_corrupt_one(folder):
    (folder / "0.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="1 of 5"):
        data = image_folder(folder, on_error="skip")
    assert np.array_equal(data.array[0], pixels_of(random_picture(1)))


def test_no_picture_at_all_can_be_read(folder):
    for file in folder.iterdir():
        file.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"none of the 5 images can be read, the first being .*0\.png"):
        image_folder(folder, on_error="skip")


def test_folders_without_pictures_say_what_they_hold(tmp_path):
    for name in ("a.txt", "b.txt", "c.md", ".hidden.png", ".thumbs/x.png"):
        (tmp_path / "notes" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "notes" / name).write_text("x")
    with pytest.raises(FileNotFoundError, match=r"no images .* holds 3 files: \.txt \(2\), \.md \(1\)"):
        load_data(tmp_path / "notes")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no files"):
        load_data(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="is not there"):
        image_folder(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="is a file, not a folder"):
        image_folder(tmp_path / "notes" / "a.txt")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"channels": 2}, "channels=2"), ({"size": 0}, "size=0"), ({"on_error": "skipp"}, "did you mean 'skip'")],
)
def test_bad_options(folder, options, message):
    with pytest.raises(ValueError, match=message):
        image_folder(folder, **options)


def picture_rows(seeds, labels):
    features = datasets.Features(
        {"id": datasets.Value("int64"), "img": datasets.Image(), "kind": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = {"id": list(seeds), "img": [random_picture(s) for s in seeds], "kind": labels}
    return datasets.Dataset.from_dict(rows, features=features)


def test_hugging_face_pictures_from_a_folder(tmp_path):
    parts = {"train": picture_rows(range(4), [0, 1, 1, 0]), "test": picture_rows([9], [1])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    data = load_data(tmp_path / "saved")
    assert (data.size, data.shape, data.classes) == (4, (3, 5, 6), ("no", "yes"))
    for row in range(4):
        assert np.array_equal(data.array[row], pixels_of(random_picture(row)))
    batch = data.rows(torch.tensor([2, 3]), torch.Generator())
    assert batch.cond["class_labels"].tolist() == [1, 0]
    assert np.array_equal(load_data(tmp_path / "saved", split="test").array[0], pixels_of(random_picture(9)))
    assert load_data(f"hf:{tmp_path}/saved", size=4, channels=1, labels=False).shape == (1, 4, 4)
    with pytest.raises(ValueError, match=r"unknown split of .* 'trian': did you mean 'train'"):
        load_data(tmp_path / "saved", split="trian")
    with pytest.raises(ValueError, match=r"unknown column of .* 'image'.* id, img, kind"):
        load_data(tmp_path / "saved", image="image")


def test_hugging_face_data_of_the_same_shape_do_not_share_a_cache(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        picture_rows([seed], [0]).save_to_disk(tmp_path / name)
        assert np.array_equal(load_data(tmp_path / name).array[0], pixels_of(random_picture(seed)))


def test_hugging_face_rows_without_a_picture(tmp_path):
    rows = {"image": [random_picture(0), None, random_picture(2)], "label": [5, 6, 7]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "gap")
    with pytest.raises(ValueError, match=r"row 1 of .*gap cannot be read"):
        load_data(tmp_path / "gap")
    with pytest.warns(UserWarning, match="1 of 3"):
        data = load_data(tmp_path / "gap", on_error="skip", label="label")
    assert data.cond["class_labels"].tolist() == [5, 7]


def test_hugging_face_arrays(tmp_path):
    values = np.random.default_rng(0).normal(size=(5, 4, 3)).astype(np.float32)
    typed = {"name": datasets.Value("string"), "field": datasets.Array2D((4, 3), "float32")}
    rows = {"name": list("abcde"), "field": list(values)}
    datasets.Dataset.from_dict(rows, features=datasets.Features(typed)).save_to_disk(tmp_path / "array")
    datasets.Dataset.from_dict({"points": values[:, 0].tolist()}).save_to_disk(tmp_path / "list")
    assert np.array_equal(load_data(tmp_path / "array").array, values)
    x = load_data(tmp_path / "list").rows(torch.arange(5), torch.Generator()).data
    assert np.allclose(x, values[:, 0])
    datasets.Dataset.from_dict({"name": ["a"]}).save_to_disk(tmp_path / "names")
    with pytest.raises(ValueError, match=r"no column of images or arrays, only name \(Value\)"):
        load_data(tmp_path / "names")
    datasets.Dataset.from_dict({"points": [[1.0], [1.0, 2.0]]}).save_to_disk(tmp_path / "ragged")
    with pytest.raises(ValueError, match=r"unequal shapes"):
        load_data(tmp_path / "ragged")


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), FileNotFoundError("no such data set")])
def test_hugging_face_offline(monkeypatch, error):
    def offline(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(FileNotFoundError, match=r"cannot get the Hugging Face data set 'someone/set' \(no .*network"):
        load_data("hf:someone/set")


def test_hugging_face_by_name(monkeypatch):
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or picture_rows([3], [1])
    )
    data = load_data("hf:someone/set", split="test", config="small")
    assert asked == [(("someone/set", "small"), {"split": "test"})]
    assert np.array_equal(data.array[0], pixels_of(random_picture(3)))


def test_the_cache_says_what_it_left_out(folder, cache):
    (folder / "1.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="left out"):
        image_folder(folder, on_error="skip")
    (entry,) = (cache / "pictures").iterdir()
    assert list(json.loads((entry / "skipped.json").read_text())) == ["1"]
