"""`fewstep edit`: pictures as strangers have them, by maps and fields of classes, text and latents."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toys.unet import tiny_field, tiny_student

import fewstep
from fewstep.cli import main
from fewstep.common.randomness import sample_generators
from fewstep.flows.guided import Guided
from fewstep.generation import edits
from fewstep.generation.edits import Told, picture_files, read_pictures, settle, units_of

GREY = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)


@pytest.fixture
def picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(GREY).save("own.png")
    return tmp_path / "own.png"


def edit(models: Path, name: str, *words: str) -> None:
    assert main(["edit", str(models / name), "--device", "cpu", *words]) == 0


def units(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).float().sub(127.5).div(127.5)[None, None]


# What it does is what the functions do


@pytest.mark.parametrize("method", ["flow-edit", "sdedit", "invert"])
def test_it_gives_what_the_function_gives(
    method: str, models: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = [] if method == "sdedit" else ["--from-label", "1"]
    words = ["--method", method, *source, "--label", "3", "--seed", "7", "--steps", "2", "--strength", "0.6"]
    edit(models, "classes", "own.png", *words, "--out", "x.npy")
    model, y = fewstep.load(models / "classes"), units(GREY)
    was, to = ({"class_labels": torch.tensor([k])} for k in (1, 3))
    noise: dict[str, Any] = {"strength": 0.6, "generator": sample_generators(7, [0])}
    if method == "flow-edit":
        wanted = fewstep.flow_edit(model, y, was, to, 2, **noise)
    elif method == "sdedit":
        wanted = fewstep.sdedit(model, y, 2, **noise, **to)
    else:
        state, residual = fewstep.invert(model, y, 2, strength=0.6, **was)
        wanted = fewstep.resume(model, state, 2, strength=0.6, **to)
        assert f"comes back to within {float(residual):.2g}" in capsys.readouterr().out
    np.testing.assert_allclose(np.load("x.npy"), wanted.numpy(), atol=1e-6)


@pytest.mark.takes_seconds
def test_a_field_is_inverted_and_drawn_again_by_heun(models: Path, picture: Path) -> None:
    field = tiny_field(classes=5)
    wanted = fewstep.resume(
        field,
        fewstep.invert(field, units(GREY), 8, class_labels=torch.tensor([1])).state,
        8,
        solver="heun",
        class_labels=torch.tensor([1]),
    )
    model, asked, told = settle(field, "invert", 1, 0, Told([1]), Told([1]))
    ((_, images, residual),) = edits.edit_batches(model, GREY[None, None], "invert", 8, asked, told)
    torch.testing.assert_close(images, wanted)
    assert residual is not None
    assert float(residual) == pytest.approx(float((wanted - units(GREY)).square().mean().sqrt()), rel=1e-4)


@pytest.mark.takes_seconds
def test_each_picture_has_its_own_noise_class_and_name_whatever_the_batch(models: Path, picture: Path) -> None:
    Path("more").mkdir()
    for i in range(3):
        Image.fromarray(np.roll(GREY, i, 0)).save(f"more/{i}.png")
    shutil.copy("own.png", "more/own.PNG")
    words = ["own.png", "more", "--from-label", "0,1", "--label", "3,4,2"]
    edit(models, "classes", *words, "--out", "all")
    assert sorted(p.name for p in Path("all").iterdir()) == ["0.png", "1.png", "2.png", "own-2.png", "own.png"]
    edit(models, "classes", *words, "--out", "two", "--batch", "2")
    for file in Path("all").iterdir():
        a, b = (np.asarray(Image.open(folder / file.name)).astype(int) for folder in (Path("all"), Path("two")))
        assert np.abs(a - b).max() <= 1, file.name
    edit(models, "classes", *words, "--out", "x.npz")
    with np.load("x.npz") as found:
        rows = found["data"]
    assert rows.shape == (5, 1, 8, 8)
    model = fewstep.load(models / "classes")
    third = fewstep.flow_edit(
        model, units(np.roll(GREY, 1, 0)), {"class_labels": torch.tensor([0])}, {"class_labels": torch.tensor([2])}, 4,
        generator=sample_generators(0, [2]),
    )  # fmt: skip
    np.testing.assert_allclose(rows[2], third[0].numpy(), atol=1e-5)


def test_classes_go_by_name(models: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = tiny_student(classes=5)
    student.class_names = ("shirt", "coat", "bag", "shoe", "hat, cap")
    monkeypatch.setattr("fewstep.runs.loading.find_model", lambda *_: student)
    edit(models, "classes", "own.png", "--from-label", "coat", "--label", "hat, cap", "--out", "x.npy")
    names = np.load("x.npy")
    edit(models, "classes", "own.png", "--from-label", "1", "--label", "4", "--out", "x.npy")
    np.testing.assert_array_equal(names, np.load("x.npy"))


# Pictures as strangers have them


def saved(path: str, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return Path(path)


@pytest.mark.usefixtures("picture")
def test_pictures_are_read_as_data_are() -> None:
    wide = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "a photo": saved("a.jpg", wide, quality=95),
        "turned by the camera": saved("b.jpg", wide, exif=turned),
        "transparent": saved("c.png", wide.convert("RGBA")),
        "a palette": saved("d.gif", wide.quantize(16)),
        "of 16 bits": saved("e.png", Image.fromarray(GREY.astype(np.uint16) << 8)),
        "grey": saved("f.png", Image.fromarray(GREY)),
        "black and white": saved("g.png", Image.fromarray(GREY).convert("1")),
        "CMYK": saved("h.jpg", wide.convert("CMYK")),
    }
    for shape in ((1, 8, 8), (3, 8, 8), (3, 16, 24)):
        pixels, note = read_pictures(list(files.values()), shape)
        assert pixels.shape == (len(files), *shape)
        assert "the middle is cut out and scaled" in note
    grey, note = read_pictures([files["of 16 bits"], files["grey"]], (1, 8, 8))
    np.testing.assert_array_equal(grey[:, 0], [GREY, GREY])
    assert note == ""
    _, note = read_pictures([files["turned by the camera"]], (1, 8, 8))
    assert note == "the model's images are 8 x 8: the middle is cut out and scaled (b.jpg, 30 x 50)"
    _, note = read_pictures(list(files.values()), (1, 8, 8))
    assert "(5 of 8, such as a.jpg, 50 x 30)" in note
    tall, _ = read_pictures(
        [saved("i.png", Image.fromarray(np.arange(64, dtype=np.uint8).repeat(8).reshape(64, 8)))], (1, 16, 8)
    )
    assert tall[0, 0, 0].mean() == pytest.approx(24, abs=1.5), "the middle, not the top"


def test_a_picture_of_another_size_is_said(models: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.kron(GREY, np.ones((5, 9))).astype(np.uint8)).convert("RGB").save("photo.jpg")
    edit(models, "classes", "photo.jpg", "--from-label", "1", "--label", "3")
    said = capsys.readouterr()
    assert "the middle is cut out and scaled (photo.jpg, 72 x 40)" in said.err
    assert "edited.png: photo.jpg edited by flow-edit, 8 network calls each" in said.out
    assert Image.open("edited.png").size == (8, 8)


# Text, latents, guidance


@pytest.mark.takes_seconds
def test_a_text_model_is_told_both_prompts_and_works_on_latents(models: Path, picture: Path) -> None:
    side = fewstep.load(models / "sd").latents.image_shape_of((4, 8, 8))[1:]
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (*side, 3), dtype=np.uint8)).save("cat.png")
    words = ["cat.png", "--source-prompt", "a cat", "--prompt", "a dog", "--steps", "2", "--strength", "0.5"]
    edit(models, "sd", *words, "--guidance-scale", "6", "--source-guidance-scale", "2", "--out", "x.npy")
    model = fewstep.load(models / "sd")
    assert model.latents is not None
    assert model.text is not None
    pixels, _ = read_pictures([Path("cat.png")], (3, *side))
    y = model.latents.encode(torch.from_numpy(pixels).float().sub(127.5).div(127.5))
    torch.testing.assert_close(units_of(model, torch.from_numpy(pixels)), y)
    guided = Guided(model, 1.0, null=model.text.null())
    was, to = (
        model.text.encode([text]) | {"guidance": torch.tensor([w])} for text, w in (("a cat", 2.0), ("a dog", 6.0))
    )
    edited = fewstep.flow_edit(guided, y, was, to, 2, strength=0.5, generator=sample_generators(0, [0]))
    np.testing.assert_allclose(np.load("x.npy"), model.latents.decode(edited).numpy(), atol=1e-4)
    edit(models, "sd", *words, "--out", "y.npy")
    assert np.abs(np.load("x.npy") - np.load("y.npy")).max() > 1e-3
    edit(
        models,
        "sd",
        "cat.png",
        "--prompt",
        "a dog",
        "--method",
        "sdedit",
        "--steps",
        "1",
        "--size",
        "32",
        "--out",
        "z.png",
    )
    assert Image.open("z.png").size == (32, 32)


def test_normalised_data_come_and_go_in_their_units() -> None:
    student = tiny_student()
    student.moments = (0.2, 0.5)
    from fewstep.generation.drawing import finished

    pixels = torch.from_numpy(GREY)[None, None]
    x = units_of(student, pixels)
    torch.testing.assert_close(x, (units(GREY) - 0.2) / 0.5)
    torch.testing.assert_close(finished(student, x), units(GREY))


def test_a_guided_model_keeps_its_strength_where_none_is_said(models: Path, picture: Path) -> None:
    field = Guided(tiny_field(classes=6), 3.0, null={"class_labels": 5})
    y = units(GREY)
    for said, scales in ((None, (3.0, 3.0)), (1.0, (3.0, 1.0))):
        model, asked, told = settle(field, "flow-edit", 1, 0, Told([3]), Told([1], guidance=said))
        ((_, images, _),) = edits.edit_batches(
            model, GREY[None, None], "flow-edit", 2, asked, told, guidance=(None, said)
        )
        to, was = (
            {"class_labels": torch.tensor([k]), "guidance": torch.tensor([w])}
            for k, w in zip((3, 1), scales, strict=True)
        )
        wanted = fewstep.flow_edit(field, y, was, to, 2, generator=sample_generators(0, [0]))
        torch.testing.assert_close(images, wanted)


# What cannot be


@pytest.mark.takes_seconds
@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("classes", "nothing.png --label 1", "the picture nothing.png cannot be read: there is no such file"),
        (
            "classes",
            "text.txt --label 1 --from-label 0",
            "the picture text.txt cannot be read: its content is no image",
        ),
        ("classes", "empty --label 1", "no images"),
        ("classes", "own.png", "--label: this model draws classes"),
        ("classes", "own.png --label 1", "--from-label: flow-edit is told what the pictures are"),
        ("classes", "own.png --label 9 --from-label 0", "the model has the classes 0 to 4"),
        ("classes", "own.png --label shoe --from-label 0", "class 'shoe'"),
        ("classes", "own.png --label 1, --from-label 0", "classes with commas between are needed"),
        ("classes", "own.png --label 1 --method sdedit --from-label 0", "does not ask what the pictures are"),
        ("classes", "own.png --label 1 --from-label 0 --method flowedit", "did you mean 'flow-edit'?"),
        ("classes", "own.png --label 1 --from-label 0 --strength 0", "strength is 0.0: above 0"),
        ("classes", "own.png --label 1 --from-label 0 --strength nan", "strength is nan"),
        ("classes", "own.png --label 1 --from-label 0 --steps 0", "steps is 0"),
        ("classes", "own.png --label 1 --from-label 0 --batch 0", "batch is 0"),
        ("classes", "own.png --label 1 --from-label 0 --average 0", "average is 0"),
        ("classes", "own.png --label 1 --method sdedit --average 2", "flow-edit alone takes an average"),
        ("classes", "own.png --label 1 --from-label 0 --tolerance 0.1", "flow-edit inverts nothing"),
        ("classes", "own.png --label 1 --from-label 0 --method invert --tolerance 1e-9", "is not inverted"),
        ("classes", "own.png --label 1 --from-label 0 --guidance-scale 3", "told no strength of it"),
        ("classes", "own.png --label 1 --from-label 0 --prompt cat", "no text encoders"),
        ("classes", "own.png --label 1 --from-label 0 --out own.txt", "samples are written as .png"),
        ("plain", "own.png", "flow-edit goes from one condition to another"),
        ("plain", "own.png --label 1 --method sdedit", "the model has no classes"),
        ("sd", "own.png", "the model is conditioned on text"),
        ("sd", "own.png --prompt dog --source-guidance-scale inf", "finite"),
    ],
)
def test_refusals_are_a_line_and_leave_nothing(
    name: str, words: str, said: str, models: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text.txt").write_text("no picture")
    Path("empty").mkdir()
    before = sorted(picture.parent.iterdir())
    assert main(["edit", str(models / name), "--device", "cpu", *words.split()]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") <= 2, "an error, and at most a note"
    assert sorted(picture.parent.iterdir()) == before


def test_points_are_no_pictures(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["edit", "checkerboard", "own.png", "--method", "sdedit"]) == 2
    assert "are no images: fewstep.flow_edit, sdedit and invert take tensors" in capsys.readouterr().err


def test_a_folder_that_holds_something_is_left_alone(
    models: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("more").mkdir()
    shutil.copy("own.png", "more/own.png")
    words = ["more", "own.png", "--from-label", "1", "--label", "3", "--out", "more"]
    assert main(["edit", str(models / "classes"), *words]) == 2
    assert "nothing in it is overwritten" in capsys.readouterr().err


def test_files_and_folders_are_found_in_order(picture: Path) -> None:
    Path("more/train").mkdir(parents=True)
    shutil.copy("own.png", "more/train/b.png")
    shutil.copy("own.png", "more/a.webp")
    found = [str(file) for file in picture_files(["own.png", "more"])]
    assert found == ["own.png", "more/a.webp", "more/train/b.png"]
