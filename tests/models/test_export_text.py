"""Exports of maps that take prompts: text encoders, tokenizers and VAE go along, and the same images come out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from toys.exports import pipeline, speak
from toys.families import tiny_pipeline

from fewstep.cli import main
from fewstep.common.randomness import sample_generators
from fewstep.flows.maps import FlowMap
from fewstep.generation.drawing import draw
from fewstep.models.exported import FlowMapPipeline
from fewstep.runs.export import export
from fewstep.runs.loading import load

NAMES = ["sd", "sdxl", "pixart", "sd3", "sd3 without", "flux"]
NAMES += ["flux2", "qwenimage", "z-image", "sana", "auraflow", "lumina2", "chroma", "hunyuanimage"]
PROMPTS = ["cat", "a dog", "cat"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of each family, as others save it."""
    folder = tmp_path_factory.mktemp("sources")
    for name in NAMES:
        tiny_pipeline(name).save_pretrained(folder / name)
    return folder


def text_map(source: Path, **options: Any) -> FlowMap:
    field: Any = load(source)
    if hasattr(field.network, "size"):
        field.network.size = 8
    return speak(FlowMap.from_field(field, **options))


def expected_of(student: FlowMap, steps: int = 2) -> torch.Tensor:
    """The images 0, 1, 2 of seed 7 in [0, 1]."""
    return draw(student, 3, steps, seed=7, prompts=PROMPTS, decode=True)[0] / 2 + 0.5


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", NAMES)
def test_the_pictures_of_prompts(name: str, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = text_map(sources / name)
    folder, expected = export(student, tmp_path / "fast"), expected_of(student)
    assert expected.std() > 0.01
    pipe = pipeline(folder)
    asked: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}
    found = pipe(PROMPTS, generator=sample_generators(7, range(3)), **asked).images
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    # One prompt for all; and conditions made beforehand, which need no encoders.
    one = pipe("cat", batch_size=3, generator=sample_generators(7, range(3)), **asked).images
    torch.testing.assert_close(one[[0, 2]], expected[[0, 2]], atol=1e-5, rtol=0)
    assert (one[1] - expected[1]).abs().max() > 2e-5
    assert student.text is not None
    given = pipe(generator=sample_generators(7, range(3)), **asked, **student.text.encode(PROMPTS)).images
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)

    shutil.move(sources / name, tmp_path / "gone")  # nothing of the source is needed any more
    try:
        back: Any = load(folder)
        assert torch.equal(expected_of(back), expected)
        for key, value in student.text.null().items():
            assert torch.equal(back.text.null()[key], value)
        again = pipeline(export(back, tmp_path / "again"))
        found = again(PROMPTS, generator=sample_generators(7, range(3)), **asked).images
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        monkeypatch.chdir(tmp_path)
        command = ["sample", "fast", "--prompt", *PROMPTS, "--count", "3", "--seed", "7", "--steps", "2"]
        assert main([*command, "--out", "x.npy"]) == 0
        np.testing.assert_allclose(np.load("x.npy") / 2 + 0.5, expected.numpy(), atol=1e-5)
    finally:
        shutil.move(tmp_path / "gone", sources / name)


def test_what_goes_along(sources: Path, tmp_path: Path) -> None:
    """Weights as safetensors alone, one variant of them, no code but the pipeline's, nobody's folders."""
    source = tmp_path / "source"
    shutil.copytree(sources / "sdxl", source)
    for part in ("text_encoder", "text_encoder_2"):
        for name in ("pytorch_model.bin", "model.fp16.safetensors", "modeling.py", "flax_model.msgpack"):
            (source / part / name).write_bytes(b"never copied")
    for name, key in (
        ("text_encoder/config.json", "_name_or_path"),
        ("tokenizer/tokenizer_config.json", "name_or_path"),
    ):
        config = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps({**config, key: "/home/somebody"}))
    (source / "tokenizer" / "merges.txt").write_text("")
    folder = export(text_map(source), tmp_path / "map")
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {name for name in files if name.startswith("text_encoder/")} == {
        "text_encoder/config.json", "text_encoder/model.safetensors",
    }  # fmt: skip
    assert {name for name in files if name.startswith("tokenizer/")} == {
        "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "tokenizer/merges.txt",
    }  # fmt: skip
    assert {name for name in files if name.endswith(".py")} == {
        "pipeline.py", "unet/two_times.py",
    }  # fmt: skip
    assert "somebody" not in "".join(p.read_text() for p in folder.rglob("*.json"))
    index = json.loads((folder / "model_index.json").read_text())
    assert index["text"] == {"pipeline": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    assert index["text_encoder_2"] == ["transformers", "CLIPTextModelWithProjection"]
    assert index["needs"] == "encoder_hidden_states, text_embeds, time_ids"


def test_the_encoders_can_be_left_out_later(sources: Path, tmp_path: Path) -> None:
    """As the guide says, for those who have conditions of their own."""
    student = text_map(sources / "sd3")
    folder = export(student, tmp_path / "map")
    index = json.loads((folder / "model_index.json").read_text())
    for name in [name for name in index if name.startswith(("text_encoder", "tokenizer"))]:
        index[name] = [None, None]
        shutil.rmtree(folder / name)
    (folder / "model_index.json").write_text(json.dumps({**index, "text": None}))
    assert load(folder).text is None
    assert student.text is not None
    cond, carried = student.text.encode(PROMPTS), DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    for pipe in (pipeline(folder), carried):
        options: dict[str, Any] = {"num_inference_steps": 2, "generator": sample_generators(7, range(3)), **cond}
        found = pipe(output_type="pt", **options).images  # pyright: ignore
        torch.testing.assert_close(found, expected_of(student), atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match="has no text encoders: leave it out"):
            pipe("cat")  # pyright: ignore


@pytest.mark.takes_seconds
def test_the_size_that_a_model_is_told(sources: Path, tmp_path: Path) -> None:
    for name in ("sdxl", "pixart"):
        student = text_map(sources / name)
        assert student.text is not None
        assert student.latents is not None
        pipe = pipeline(export(student, tmp_path / name))
        size = {"sdxl": (24, 16), "pixart": (24, 24)}[name]
        cond = student.text.encode(["cat"], size=size)
        noise = torch.randn(1, 4, size[0] // 2, size[1] // 2)
        asked: dict[str, Any] = {"num_inference_steps": 1, "output_type": "pt"}
        found = pipe("cat", latents=noise, **asked).images
        torch.testing.assert_close(found, pipe(latents=noise, **asked, **cond).images, atol=1e-6, rtol=0)
        named = "time_ids" if name == "sdxl" else "resolution"
        other = pipe("cat", latents=noise, **asked, **{named: 3 * cond[named]}).images  # pyright: ignore
        assert (other - found).abs().max() > 1e-6
        generator = torch.Generator().manual_seed(0)
        sized = pipe("cat", height=size[0], width=size[1], generator=generator, **asked).images
        assert sized.shape == (1, 3, *size)


def test_what_is_refused(sources: Path, tmp_path: Path) -> None:
    pipe = pipeline(export(text_map(sources / "sd"), tmp_path / "map"))
    with pytest.raises(ValueError, match="needs encoder_hidden_states, one row an image: give it a prompt, or pass"):
        pipe()
    with pytest.raises(ValueError, match=r"4 images, but \[2\] prompts"):
        pipe(["cat", "dog"], batch_size=4)


@pytest.mark.takes_seconds
def test_the_card_of_a_model_of_text(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code runs, and it names what the base model's card does."""
    source = tmp_path / "source"
    shutil.copytree(sources / "sd", source)
    front = "license: openrail++\nlicense_link: LICENSE.md\nbase_model: [somebody/tiny]\ntags: [x]\nwidget: {a: b}"
    (source / "README.md").write_text(f"---\n{front}\n---\n# Tiny\n")
    folder = export(text_map(source), tmp_path / "fast", method="ITVM")
    card = (folder / "README.md").read_text()
    told = yaml.safe_load(card.split("---\n")[1])
    assert told == {
        "library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": ["fewstep", "flow-map"],
        "license": "openrail++", "license_link": "LICENSE.md", "base_model": ["somebody/tiny"],
    }  # fmt: skip
    assert "@" in card.split("```bibtex\n")[1]
    assert "license: openrail++" in (export(load(folder), tmp_path / "again") / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("a photo of a cat", "cat")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert [image.size for image in names["images"]] == [(16, 16)] * 4


ELSEWHERE = """
    import sys
    from pathlib import Path

    import torch
    from diffusers import DiffusionPipeline
    from safetensors.torch import save_file

    folder, start = Path(sys.argv[1]), int(sys.argv[2])
    images = {}
    for export in sorted(folder.iterdir()):
        pipe = DiffusionPipeline.from_pretrained(export, trust_remote_code=True)
        generators = [torch.Generator().manual_seed((start + i) & 0xFFFFFFFF) for i in range(3)]
        out = pipe(["cat", "a dog", "cat"], num_inference_steps=2, generator=generators, output_type="pt")
        images[export.name] = out.images.contiguous()
    assert "fewstep" not in sys.modules
    save_file(images, folder.parent / "images.safetensors")
"""


@pytest.mark.takes_seconds
def test_the_same_pictures_without_fewstep(sources: Path, tmp_path: Path, elsewhere: Callable[..., str]) -> None:
    students = {name: text_map(sources / name) for name in NAMES}
    for name, student in students.items():
        export(student, tmp_path / "exports" / name)
    elsewhere(ELSEWHERE, tmp_path / "exports", sample_generators(7, range(1))[0].initial_seed())
    images = load_file(tmp_path / "images.safetensors")
    assert set(images) == set(NAMES)
    for name, found in images.items():
        torch.testing.assert_close(found, expected_of(students[name]), atol=1e-5, rtol=0)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])  # of today, and of older versions
@pytest.mark.parametrize("kind", [DiffusionPipeline, FlowMapPipeline])
def test_text_encoders_are_used_in_half_precision(kind: Any, name: str, sources: Path, tmp_path: Path) -> None:
    student = text_map(sources / "sd")
    folder = export(student, tmp_path / "map")
    trust = {"trust_remote_code": True} if kind is DiffusionPipeline else {}
    pipe: Any = kind.from_pretrained(folder, **trust, **{name: torch.bfloat16})
    pipe.set_progress_bar_config(disable=True)
    assert pipe.text_encoder.dtype == pipe.network.dtype == torch.bfloat16
    found = pipe(PROMPTS, num_inference_steps=2, generator=sample_generators(7, range(3)), output_type="pt").images
    assert (found - expected_of(student)).abs().mean() < 0.05
