"""What others get holds files of its own, each what its name says, and no places of this machine; names that files give
are names, no paths."""

import hashlib
import io
import json
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from toys.families import tiny_pipeline
from toys.places import ROOT
from toys.unet import tiny_field, tiny_student

from fewstep.cli import main
from fewstep.common.errors import TrainingError
from fewstep.common.received import clean_png, is_place, own_file, plain_name, without_places
from fewstep.data.encoded import Encoded
from fewstep.flows.maps import FlowMap
from fewstep.models import hub
from fewstep.models.adapter_files import load_adapter, save_adapter
from fewstep.models.lora import add_lora
from fewstep.runs.convert import convert
from fewstep.runs.export import export
from fewstep.runs.loading import load
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run
from fewstep.runs.runtimes import export_program
from fewstep.training import checkpoints

KEY = b"-----BEGIN OPENSSH PRIVATE KEY-----\nsecret\n"


def picture(text: str = "", after: bytes = b"") -> bytes:
    """A PNG, with what may be said in one and after its end."""
    content, info = io.BytesIO(), PngInfo()
    info.add_text("Comment", text)
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(content, "png", pnginfo=info)
    return content.getvalue() + after


def bytes_of(folder: Path) -> dict[str, bytes]:
    """What is in a folder, with what is packed in its files."""
    found = {}
    for file in folder.rglob("*"):
        if file.is_file():
            found[str(file.relative_to(folder))] = file.read_bytes()
        if file.is_file() and zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as pack:
                found |= {f"{file.name}/{name}": pack.read(name) for name in pack.namelist()}
    return found


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of points."""
    tree = {
        "name": "points", "teacher": "eight-gaussians", "data": "eight-gaussians", "objective": "ITVM",
        "student": {"network": "mlp", "options": {"width": 8, "depth": 2}},
        "training": {"steps": 2, "batch": 32, "quiet": True}, "evaluation": {"count": 0},
    }  # fmt: skip
    out = tmp_path_factory.mktemp("points") / "run"
    run(load_recipe(tree), out)
    return out


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "sd"
    tiny_pipeline("sd").save_pretrained(folder)
    return folder


def leads_to(target: Path) -> Callable[[Path], None]:
    return lambda file: file.symlink_to(target)


HOSTILE: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "a link to a key": (lambda file, home: file.symlink_to(home / "id_rsa"), "is a link out of"),
    "a link to an image": (lambda file, home: file.symlink_to(home / "private.png"), "is a link out of"),
    "a link to a link": (
        lambda file, home: (file.with_name("x").symlink_to(home / "id_rsa"), file.symlink_to("x")),
        "a link out",
    ),
    "a key": (lambda file, home: file.write_bytes(KEY), "is no PNG"),
    "a key with the head of a PNG": (lambda file, home: file.write_bytes(picture()[:8] + KEY), "is no PNG"),
    "another name of an image": (lambda file, home: os.link(home / "private.png", file), "hard link"),
    "a pipe": (lambda file, home: os.mkfifo(file), "is no file"),
    "a folder": (lambda file, home: file.mkdir(), "is no file"),
    "half an image": (lambda file, home: file.write_bytes(picture()[:60]), "is no PNG"),
}


@pytest.mark.takes_seconds
@pytest.mark.parametrize("how", HOSTILE)
@pytest.mark.parametrize("name", ["samples/step-00000009.png", "quality.png"])
def test_pictures_of_a_run_are_pictures_of_its_own(name: str, how: str, points: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(points, folder)
    (tmp_path / "id_rsa").write_bytes(KEY)
    (tmp_path / "private.png").write_bytes(picture("private"))
    (folder / name).unlink(missing_ok=True)
    make, why = HOSTILE[how]
    make(folder / name, tmp_path)
    with pytest.warns(UserWarning, match=f"{re.escape(name)}.*{why}.*left out of the export"):
        out = export(folder, tmp_path / "out")
    found = bytes_of(out)
    kept = {"samples/step-00000009.png": "training/samples.png", "quality.png": "training/quality.png"}[name]
    assert kept not in found
    assert kept not in found["README.md"].decode()
    assert not [file for file, content in found.items() if b"secret" in content or b"private" in content]


def test_what_is_in_a_picture_besides_it_stays_behind(points: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(points, folder)
    for old in (folder / "samples").glob("*"):
        old.unlink()
    (folder / "samples" / "step-00000002.png").write_bytes(picture("of /home/me", KEY))
    out = export(folder, tmp_path / "out")
    copy = (out / "training" / "samples.png").read_bytes()
    assert b"/home/me" not in copy
    assert KEY not in copy
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(copy))), np.arange(64).reshape(8, 8))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "I;16", "LA"])
def test_pictures_are_packed_anew_with_the_same_pixels(mode: str, tmp_path: Path) -> None:
    whole = Image.effect_noise((9, 7), 80).convert("RGBA")
    made = Image.new("I;16", (9, 7), 3000) if mode == "I;16" else whole.convert(mode)
    options = {"transparency": 3} if mode == "P" else {}
    made.save(tmp_path / "a.png", **options)
    (tmp_path / "b.png").write_bytes(clean_png(tmp_path / "a.png"))
    first, second = (Image.open(tmp_path / name) for name in ("a.png", "b.png"))
    assert first.mode == second.mode
    assert first.convert("RGBA").tobytes() == second.convert("RGBA").tobytes()


PARTS = [
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
]


def swap(folder: Path, name: str, make: Callable[[Path], Any]) -> None:
    file = folder / name
    file.unlink(missing_ok=True)
    make(file)


@pytest.mark.parametrize("name", [*PARTS, "tokenizer"])
@pytest.mark.parametrize("how", ["export", "convert"])
def test_parts_that_are_links_out_of_their_pipeline_are_not_copied(
    how: str, name: str, source: Path, tmp_path: Path
) -> None:
    folder, other = tmp_path / "sd", tmp_path / "other"
    shutil.copytree(source, folder)
    shutil.copytree(source, other)
    (other / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(other / name)
    write = {
        "convert": lambda: convert(folder, tmp_path / "out", check=False),
        "export": lambda: export(FlowMap.from_field(load(folder)), tmp_path / "out"),  # pyright: ignore
    }
    with pytest.raises(ValueError, match=r"is a link out of .*sd, and what others get follows none"):
        write[how]()
    assert not (tmp_path / "out").exists()


def test_a_download_of_the_hub_is_links_to_its_own_blobs(source: Path, tmp_path: Path) -> None:
    home = tmp_path / "hub" / "models--me--sd"
    snapshot, blobs = home / "snapshots" / "abc", home / "blobs"
    blobs.mkdir(parents=True)
    for file in [file for file in source.rglob("*") if file.is_file()]:
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        link = snapshot / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    out = convert(snapshot, tmp_path / "out", check=False).folder
    assert (out / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    assert not [file for file in out.rglob("*") if file.is_symlink()]
    (tmp_path / "id_rsa").write_bytes(KEY)
    (snapshot / "vae" / "config.json").unlink()
    (snapshot / "vae" / "config.json").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(ValueError, match="a link out of"):
        own_file(snapshot / "vae" / "config.json", snapshot)


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"../../private": ["diffusers", "X"]}, r"names a part '\.\./\.\./private': a word is needed"),
        ({"/etc": ["transformers", "X"]}, "names a part '/etc'"),
        ({"helper": ["os", "system"]}, "has helper from 'os'"),
        ({"helper": ["flow_model", "Evil"]}, "has helper from 'flow_model'"),
    ],
)
def test_parts_of_a_pipeline_are_words_and_of_known_libraries(
    entry: dict[str, Any], why: str, source: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "a" / "b" / "sd"
    shutil.copytree(source, folder)
    (tmp_path / "a" / "private").mkdir()
    (tmp_path / "a" / "private" / "config.json").write_text("{}")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **entry}))
    with pytest.raises(ValueError, match=why):
        convert(folder, tmp_path / "c" / "d" / "out", check=False)
    assert not list((tmp_path / "c").rglob("config.json"))


@pytest.mark.takes_seconds
def test_text_encoders_are_of_known_classes_and_run_no_code(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sd"
    shutil.copytree(source, folder)
    index = json.loads((folder / "model_index.json").read_text())
    for name, entry in (
        ("text_encoder", ["transformers", "AutoModel"]), ("tokenizer", ["transformers", "pipeline"]),
        ("text_encoder", ["os", "CLIPTextModel"]),
    ):  # fmt: skip
        (folder / "model_index.json").write_text(json.dumps({**index, name: entry}))
        with pytest.raises(ValueError, match=f"unknown class of {name}"):
            load(folder).text.encode(["a cat"])  # pyright: ignore
    (folder / "model_index.json").write_text(json.dumps(index))
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    for key in ("auto_map", "attn_implementation"):
        (folder / "text_encoder" / "config.json").write_text(json.dumps({**config, key: "me/kernel"}))
        with pytest.raises(ValueError, match=f"names code \\({key}\\)"):
            load(folder).text.encode(["a cat"])  # pyright: ignore
    # Names of parts are no paths, and others are no text encoders.
    (folder / "model_index.json").write_text(
        json.dumps({**index, "tokenizer/../../x": ["transformers", "CLIPTokenizer"]})
    )
    with pytest.raises(ValueError, match="names a part 'tokenizer/"):
        convert(folder, tmp_path / "out", check=False)


NAMES = ["../../../etc/passwd", "/etc/passwd", "..", "", "a/b.safetensors", "a\\b", None, 3]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_files_give_are_names(name: Any, points: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no path"):
        plain_name(name, Path("x.json"))
    folder = tmp_path / "run"
    shutil.copytree(points, folder)
    if not isinstance(name, str):
        return  # keys of JSON are texts
    last = checkpoints.latest(folder / "checkpoints")
    assert last is not None
    state = json.loads((last / "state.json").read_text())["state"]
    kept = state["files"].pop("ema.safetensors")
    state["files"][name] = kept
    (last / "state.json").write_text(checkpoints.seal(state))
    with pytest.raises(TrainingError, match=r"state\.json"):
        load(folder)


def test_so_are_those_of_encoded_data_and_of_weights_in_pieces(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "encoded"
    folder.mkdir()
    facts = {"format": 1, "shape": [4, 8, 8], "command": "x", "text": None, "classes": None}
    (folder / "encoded.json").write_text(json.dumps(facts))
    (folder / "index.json").write_text(json.dumps({"latents/../../secret": {"bytes": 1, "rows": 1}}))
    with pytest.raises(ValueError, match=r"index\.json (names the file|is damaged)"):
        Encoded(folder)
    shutil.copytree(source, tmp_path / "sd")
    listed = tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    for name, why in (("../../secret.safetensors", "no path"), ("absent.safetensors", "is missing, which")):
        listed.write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
        with pytest.raises((ValueError, FileNotFoundError), match=why):
            load(tmp_path / "sd")


@pytest.mark.takes_seconds
def test_adapters_say_what_their_layers_compute_and_name_no_module(tmp_path: Path) -> None:
    student = tiny_student()
    add_lora(student, rank=2)
    save_adapter(student, tmp_path / "adapter")
    load_adapter(tiny_student(), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    kept = json.loads(file.read_text())
    file.write_text(json.dumps({**kept, "init_lora_weights": "gaussian", "task_type": "X", "revision": "main"}))
    load_adapter(tiny_student(), tmp_path / "adapter")
    for more in (
        {"megatron_config": {"a": 1}, "megatron_core": "this"},
        {"init_lora_weights": "pissa"},
        {"loftq_config": {"a": 1}},
    ):
        file.write_text(json.dumps({**kept, **more}))
        with pytest.raises(ValueError, match=r"adapter_config\.json has (megatron|init_lora_weights|loftq)"):
            load_adapter(tiny_student(), tmp_path / "adapter")


# Names, not places.


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("/home/me/ddpm", "ddpm"), ("~/models/ddpm", "ddpm"), ("../m/ddpm/", "ddpm"), ("./ddpm", "ddpm"),
        ("/home/me/net.py:F", "net.py:F"), ("C:\\models\\ddpm", "ddpm"), ("file:///home/me/x", "x"), ("/x", "x"),
        ("owner/name", "owner/name"), ("hf:owner/name", "hf:owner/name"), ("checkerboard", "checkerboard"),
        ("fewstep:fashion-mnist", "fewstep:fashion-mnist"), ("https://hub/a", "https://hub/a"),
        ("a cat / a dog", "a cat / a dog"), ("</s>", "</s>"), ("net.py:F", "net.py:F"), ("ratio: 1/2", "ratio: 1/2"),
    ],
)  # fmt: skip
def test_a_place_is_known_by_its_name(said: str, name: str) -> None:
    assert without_places({"a": [said, 3]}) == {"a": [name, 3]}
    assert is_place(said) == (said != name)


def test_a_place_that_is_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert without_places("models/ddpm") == "models/ddpm"
    (tmp_path / "models" / "ddpm").mkdir(parents=True)
    assert without_places("models/ddpm") == "ddpm"


def placed_nowhere(folder: Path, tmp_path: Path) -> None:
    """That nothing in a folder says where anything was on this machine."""
    told = (
        str(tmp_path).encode(),
        str(ROOT).encode(),
        b"site-packages",
        str(Path.home()).encode() + b"/",
    )
    found = [(name, place) for name, content in bytes_of(folder).items() for place in told if place in content]
    assert found == []


OWN = "import fewstep\n\n\nclass Own(fewstep.ITVM):\n    pass\n"


@pytest.mark.takes_seconds
def test_exports_of_every_kind_hold_names_and_no_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline = tmp_path / "models" / "sd"
    tiny_pipeline("sd").save_pretrained(pipeline)
    told = {"_name_or_path": str(pipeline), "name_or_path": str(pipeline), "tokenizer_file": f"{pipeline}/x.json"}
    for config in (
        "unet/config.json", "vae/config.json", "text_encoder/config.json", "model_index.json",
        "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json",
    ):  # fmt: skip
        file = pipeline / config
        file.write_text(json.dumps({**json.loads(file.read_text()), **told}))
    (pipeline / "README.md").write_text(f"---\nlicense: mit\nbase_model: {tmp_path}/older\n---\n")
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "captions.txt").write_text("cat\ndog\n")
    np.savez(tmp_path / "data.npz", data=np.zeros((8, 4, 8, 8), np.float32))
    tree = {
        "name": "sd", "teacher": {"source": str(pipeline), "guidance": {"scale": 2.0, "null": "text"}},
        "data": {"name": "teacher", "prompts": str(tmp_path / "captions.txt"), "count": 4, "steps": 1, "batch": 4},
        "objective": f"{tmp_path}/own.py:Own", "training": {"steps": 1, "batch": 4, "quiet": True},
        "student": {"lora": {"rank": 2}}, "evaluation": {"count": 0},
    }  # fmt: skip
    run(load_recipe(tree), tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export("run", "out")
        export("run", "adapter", adapter=True)
        convert(pipeline, "flow", count=2, steps=[10], prompts=["cat"])
        export(load(pipeline), "stock")
        for kind in ("torch", "onnx"):
            export_program(tiny_student(), f"program-{kind}", kind)
        save_adapter(load_with_adapter(), tmp_path / "bare")
    for name in ("out", "adapter", "flow", "stock", "program-torch", "program-onnx", "bare"):
        placed_nowhere(tmp_path / name, tmp_path)
    recipe = yaml.safe_load((tmp_path / "out" / "training" / "recipe.yaml").read_text())
    assert recipe["teacher"]["source"] == "sd"
    assert recipe["objective"]["name"] == "own.py:Own"
    assert recipe["data"]["prompts"] == "captions.txt"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Trained with own.py:Own" in card
    assert "license: mit" in card
    assert "base_model" not in card
    assert (
        main(
            ["sample", str(tmp_path / "out"), "--prompt", "cat", "--count", "1", "--out", "pictures", "--device", "cpu"]
        )
        == 0
    )
    assert Image.open("pictures/00000.png").info["model"] == "out"


def load_with_adapter() -> Any:
    field = tiny_field()
    add_lora(field, rank=2)
    return field


# What is pushed is looked at once more.


@pytest.mark.parametrize(
    ("name", "make", "why"),
    [
        ("a.png", lambda file, home: file.write_bytes(b"no image"), "is no PNG"),
        ("a.png", lambda file, home: file.write_bytes(picture(after=KEY)), "a token or a key"),
        ("a.png", lambda file, home: file.write_bytes(KEY), "a token or a key"),
        ("a.json", lambda file, home: file.write_text("{"), "is no JSON"),
        ("a.safetensors", lambda file, home: file.write_bytes(b"none"), "is no safetensors"),
        ("a.safetensors", lambda file, home: file.write_bytes(bytes(3 << 20) + KEY), "a token or a key"),
        ("a.txt", lambda file, home: os.link(home / "diary.txt", file), "hard link"),
        ("a.md", lambda file, home: file.symlink_to(home / "diary.txt"), "a link out of"),
    ],
)
def test_what_is_not_what_its_name_says_is_not_pushed(
    name: str, make: Callable[[Path, Path], Any], why: str, tmp_path: Path
) -> None:
    export(tiny_student(), tmp_path / "out")
    hub.check_folder(tmp_path / "out")
    (tmp_path / "diary.txt").write_text("dear")
    make(tmp_path / "out" / name, tmp_path)
    with pytest.raises(ValueError, match=why):
        hub.check_folder(tmp_path / "out")
