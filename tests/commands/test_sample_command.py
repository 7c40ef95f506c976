"""`fewstep sample`: which samples, of what, how fast and by how many; folders that go on."""

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from toys.families import tiny_model, tiny_pipeline, tiny_vae
from toys.sampling import Draw, close

import fewstep
from fewstep.cli import main
from fewstep.common.console import progress_bar
from fewstep.flows import signature
from fewstep.flows.fields import NetworkField
from fewstep.flows.guided import Guided
from fewstep.flows.sampling import sample, sample_noise
from fewstep.generation import drawing
from fewstep.generation.drawing import draw
from fewstep.generation.images import claim
from fewstep.generation.placement import place
from fewstep.generation.requests import Encoded, Requests, class_names, class_numbers, prompt_flags, read_lines
from fewstep.latents.vae import Latents
from fewstep.networks import SD3, Flux
from fewstep.runs.loading import load

CPU = torch.device("cpu")
TEXTS = ["a cat", "dog", "a dog"]


# Which samples


def test_first_goes_on_where_a_command_ended(draws: Draw) -> None:
    whole = draws("classes", "--count", "8", "--seed", "3", "--gamma", "0.5")
    close(draws("classes", "--count", "3", "--first", "5", "--seed", "3", "--gamma", "0.5"), whole[5:])
    assert np.abs(whole[:3] - whole[5:]).max() > 0.1


@pytest.mark.takes_seconds
def test_noise_on_the_way_is_each_samples_own(draws: Draw) -> None:
    words = ("--steps", "3", "--eps", "kappa", "--solver", "ancestral", "--labels", "1,2", "--seed", "3")
    whole = draws("dit", "--count", "4", *words)
    close(draws("dit", "--count", "2", "--first", "2", *words), whole[2:])
    close(draws("dit", "--count", "4", "--batch", "1", *words), whole)
    assert np.abs(draws("dit", "--count", "4", *words, "--eps", "0") - whole).max() > 0.1
    assert np.abs(draws("dit", "--count", "4", *words, "--eps", "0.5", "--last-step", "none") - whole).max() > 0.1


def test_noise_that_cannot_be(refused: Any) -> None:
    assert "noise along the ODE of a velocity field; a flow map has gamma" in refused("plain", "--eps", "kappa")
    for words, says in {
        (
            "--eps",
            "-1",
        ): "eps=-1.0 is -1 at t = 0: the strength of the noise is a number from 0 (the ODE) on, or one of",
        ("--eps", "nan"): "eps=nan is nan at t = 0",
        ("--eps", "kapa"): "unknown strength of noise eps 'kapa': did you mean 'kappa'?",
        ("--eps", "1", "--solver", "midpoint"): "unknown solver of an SDE 'midpoint'",
        ("--last-step", "mean"): "give eps too",
        ("--eps", "1", "--last-step", "x"): "unknown last step 'x'",
    }.items():
        assert says in refused("dit", *words), words


def test_seeds_are_the_first_samples_of_each(draws: Draw) -> None:
    several = draws("plain", "--seeds", "5,9,17")
    close(several, np.concatenate([draws("plain", "--seed", seed, "--count", "1") for seed in ("5", "9", "17")]))


def test_a_line_of_a_file_says_text_seed_and_label(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"text": "a cat", "seed": 5}\n\n{"prompt": "dog", "label": "hen"}\n')
    with pytest.raises(ValueError, match=r"has a label on 1 of 2 lines: all of them or none"):
        read_lines(file)
    file.write_text(
        '{"text": "a cat", "seed": 5, "label": 3}\n{"prompt": "dog", "label": "hen", "seed": 1, "index": 2}'
    )
    lines = read_lines(file)
    assert lines == (["a cat", "dog"], [3, "hen"], [(5, 0), (1, 2)])
    asked = Requests(2, 7, 0, lines.prompts, [3, 4], lines.noise)
    assert [vars(asked[i]) for i in range(2)] == [
        {"seed": 5, "index": 0, "prompt": "a cat", "label": 3},
        {"seed": 1, "index": 2, "prompt": "dog", "label": 4},
    ]


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e", "\r", "\n", "\r\n"])
def test_the_list_of_a_folder_reads_back(odd: str, tmp_path: Path) -> None:
    texts = [f"a{odd}cat", "-hat"]
    claim(tmp_path, {}, Requests(2, 3, prompts=texts))
    assert read_lines(tmp_path / "samples.jsonl") == (texts, [], [(3, 0), (3, 1)])
    if odd.strip("\r\n"):
        (tmp_path / "p.txt").write_bytes("\r\n".join(texts).encode())
        assert read_lines(tmp_path / "p.txt").prompts == texts


def test_a_text_that_is_null_leaves_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": null, "prompt": "a"}\n{"text": "b", "prompt": null}\n{"text": ""}')
    assert read_lines(tmp_path / "p.jsonl").prompts == ["a", "b", ""]


@pytest.mark.takes_seconds
def test_prompts_that_begin_with_a_dash(draws: Draw) -> None:
    steps = ("--steps", "1")
    whole = draws("sd", "--prompt=-hat", "--prompt", "a cat", "dog", *steps, "--count", "3")
    Path("p.txt").write_text("-hat\na cat\ndog\n")
    close(draws("sd", "--prompts", "p.txt", *steps), whole)
    assert prompt_flags(["a cat", "dog"]) == ["--prompt", "a cat", "dog"]
    assert prompt_flags(["a cat", "-hat"]) == ["--prompt=a cat", "--prompt=-hat"]
    assert prompt_flags([]) == []


@pytest.mark.takes_seconds
def test_sample_i_takes_prompt_i_of_a_file(draws: Draw, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeffa cat\n\n  dog  \na dog\n")
    steps = ("--steps", "2")
    whole = draws("sd", "--prompts", "p.txt", *steps)
    assert len(whole) == 3
    close(whole, draws("sd", "--prompt", *TEXTS, "--count", "3", *steps))
    close(draws("sd", "--prompts", "p.txt", "--count", "2", *steps), whole[:2])
    close(draws("sd", "--prompts", "p.txt", "--first", "2", *steps), whole[2:])
    (tmp_path / "p.jsonl").write_text('{"text": "a dog", "seed": 5}\n{"text": "dog"}\n')
    other = draws("sd", "--prompts", "p.jsonl", *steps)
    close(other[:1], draws("sd", "--prompt", "a dog", "--seed", "5", "--count", "1", *steps))
    close(other[1:], whole[1:2])


def test_each_prompt_is_encoded_once_and_let_go_after_its_last_use(models: Path) -> None:
    field: Any = load(models / "sd")
    calls: list[list[str]] = []

    class Counting:
        def encode(self, prompts: list[str], **options: Any) -> dict[str, torch.Tensor]:
            calls.append(list(prompts))
            return field.text.encode(prompts, **options)

    text: Any = Counting()
    wanted = field.text.encode(TEXTS)["encoder_hidden_states"]
    encoded = Encoded(text, {"a cat": 3, "dog": 1, "a dog": 1}, CPU)
    told = encoded(["a cat", "dog", "a cat"])["encoder_hidden_states"]
    assert torch.allclose(told, wanted[[0, 1, 0]], atol=1e-6)
    assert list(encoded.kept) == ["a cat"]
    assert torch.allclose(encoded(["a dog", "a cat"])["encoder_hidden_states"], wanted[[2, 0]], atol=1e-6)
    assert calls == [["a cat", "dog"], ["a dog"]]
    assert not encoded.kept


def test_ten_thousand_prompts_are_encoded_as_they_are_needed() -> None:
    class Rows:
        most = 0

        def encode(self, prompts: list[str], **_: Any) -> dict[str, torch.Tensor]:
            self.most = max(self.most, len(prompts))
            return {"c": torch.tensor([[float(p)] for p in prompts])}

    text: Any = Rows()
    names = [str(i) for i in range(10_000)]
    encoded, held = Encoded(text, dict.fromkeys(names, 1), CPU), 0
    for start in range(0, 10_000, 250):
        told = encoded(names[start : start + 250])
        assert torch.equal(told["c"][:, 0], torch.arange(start, start + 250.0))
        held = max(held, len(encoded.kept))
    assert (text.most, held) == (32, 0)


def test_what_is_kept_of_prompts_that_come_again_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows:
        calls = 0

        def encode(self, prompts: list[str], **_: Any) -> dict[str, torch.Tensor]:
            self.calls += len(prompts)
            return {"c": torch.tensor([[float(p)] for p in prompts])}

    monkeypatch.setattr("fewstep.generation.requests._KEPT_BYTES", 3 * 4)
    text: Any = Rows()
    encoded = Encoded(text, dict.fromkeys("123456", 2), CPU)
    encoded(list("123456"))
    assert list(encoded.kept) == list("456")
    assert encoded(list("651"))["c"][:, 0].tolist() == [6, 5, 1]
    assert text.calls == 7


def test_classes_by_name(draws: Draw, models: Path) -> None:
    names = class_names(load(models / "dit"))
    assert names == {"tench": 0, "Tinca tinca": 0, "goldfish": 1, "great white shark": 2, "cock": 3, "hen": 4}
    assert class_numbers(["Tinca tinca", 3, "4"], names) == [0, 3, 4]
    steps = ("--steps", "1", "--count", "3")
    close(draws("dit", "--labels", "hen, goldfish", *steps), draws("dit", "--labels", "4,1", *steps))
    many = {f"class number {i}": i for i in range(999)} | {"golden retriever": 999}
    with pytest.raises(ValueError, match=r"unknown class 'goldn retriever': did you mean 'golden retriever'\?") as no:
        class_numbers(["goldn retriever"], many)
    assert len(str(no.value)) < 400


@pytest.mark.takes_seconds
def test_classes_by_name_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(tmp_path / "pets" / name / f"{i}.png")
    (tmp_path / "own.yaml").write_text(
        "data: {name: ./pets, size: 8, channels: 1}\nobjective: FlowMatching\n"
        "student: {network: unet, options: {block_out_channels: [8, 8], norm_num_groups: 4, layers_per_block: 1, "
        "num_class_embeds: 2, down_block_types: [DownBlock2D, DownBlock2D], up_block_types: [UpBlock2D, UpBlock2D]}}\n"
        "training: {steps: 1, batch: 4, quiet: true}\nevaluation: {count: 0}\n"
    )
    assert main(["train", "own.yaml"]) == 0
    words = ["sample", "runs/own", "--count", "3", "--steps", "1", "--device", "cpu"]
    assert main([*words, "--labels", "dog,cat", "--out", "a.npz"]) == 0
    with np.load("a.npz") as kept:
        assert kept["class_labels"].tolist() == [1, 0, 1]
    capsys.readouterr()
    for flags in (["sample", "runs/own", "--labels"], ["edit", "runs/own", "pets/cat/0.png", "--label"]):
        assert main([*flags, "dog,,cat", "--out", "b.npz"]) == 2
        assert f"{flags[-1]} dog,,cat: classes with commas between are needed" in capsys.readouterr().err
    assert main([*words, "--labels", "dgo"]) == 2
    assert "unknown class 'dgo': did you mean 'dog'? Known: cat, dog" in capsys.readouterr().err


# How


def test_the_batch_changes_nothing(draws: Draw) -> None:
    close(draws("classes", "--count", "5", "--batch", "2"), draws("classes", "--count", "5"))


@pytest.mark.parametrize("name", ["plain", "dit"])
def test_half_precision_is_near_and_its_state_is_float32(name: str, models: Path) -> None:
    model: Any = load(models / name)
    cond: Any = {"class_labels": torch.tensor([0, 4])} if name == "dit" else {}
    noise = sample_noise((2, *signature.shape_of(model)), torch.Generator().manual_seed(0))
    full = sample(model, noise, 2, **cond)
    taken = [signature.takes(model, condition) for condition in ("class_labels", "something")]
    seen: list[torch.dtype] = []
    given: list[torch.dtype] = []
    model.network.register_forward_hook(lambda _m, _x, out: given.append(out.dtype))
    next(m for m in model.modules() if isinstance(m, nn.Linear)).register_forward_hook(
        lambda _m, _x, out: seen.append(out.dtype)
    )
    half = sample(place(model, CPU, "bf16"), noise, 2, **cond)
    assert [signature.takes(model, condition) for condition in ("class_labels", "something")] == taken == [True, False]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (set(seen), set(given)) == ({torch.bfloat16}, {torch.float32})
    assert half.dtype == torch.float32
    error = (half - full).abs().max() / full.abs().max()
    assert 1e-5 < float(error) < 0.05


@pytest.mark.takes_seconds
def test_a_text_model_in_half_precision(draws: Draw) -> None:
    words = ("--prompt", *TEXTS, "--count", "3", "--steps", "2", "--guidance-scale", "3")
    full, half = draws("sd", *words), draws("sd", *words, "--dtype", "bf16")
    assert 0 < np.abs(full - half).max() < 0.1


def test_compiled_or_refused(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import BackendCompilerFailed

    model: Any = load(models / "plain")
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    wanted = sample(model, noise, 2)
    compiled: list[Any] = []

    def eager(function: Any) -> Any:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", eager)
    assert torch.equal(sample(place(load(models / "plain"), CPU, compiled=True), noise, 2), wanted)
    assert len(compiled) == 1

    def broken(_function: Any) -> Any:
        def fail(*_x: Any, **_y: Any) -> Any:
            raise BackendCompilerFailed("inductor", RuntimeError("no C++ compiler"), None)

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ValueError, match=r"torch could not compile UNet2DModel \(.*no C\+\+ compiler.*leave --compile"):
        sample(place(model, CPU, compiled=True), noise, 2)


@pytest.mark.parametrize(("name", "size", "shape"), [("plain", "12x20", (1, 12, 20)), ("sd", "24x16", (3, 24, 16))])
def test_another_size(name: str, size: str, shape: tuple[int, ...], draws: Draw) -> None:
    text = ("--prompt", "a cat") if name == "sd" else ()
    images = draws(name, "--size", size, "--count", "2", "--steps", "1", *text)
    assert images.shape[1:] == shape


def test_the_size_is_told_to_a_model_that_knows_sizes(models: Path, tmp_path: Path) -> None:
    tiny_pipeline("sdxl").save_pretrained(tmp_path)
    field: Any = load(tmp_path)
    asked = drawing.settled(field, Requests(1, prompts=["a cat"]))
    rows = drawing.draw_batches(field, asked, [range(1)], 1, shape=(4, 12, 8), size=(24, 16))
    told = field.text.encode(["a cat"], size=(24, 16))
    wanted = sample(field, sample_noise((1, 4, 12, 8), fewstep.common.randomness.sample_generators(0, [0])), 1, **told)
    assert torch.allclose(next(rows)[1], wanted, atol=1e-5)


def test_strengths_of_a_guided_teacher_are_told_and_not_doubled(models: Path) -> None:
    field: Any = load(models / "sd")
    guided = Guided(field, 2.0, null=field.text.null())
    one, _, _ = draw(guided, 2, 1, prompts=TEXTS, guidance=3.0)
    other, _, _ = draw(field, 2, 1, prompts=TEXTS, guidance=3.0)
    assert torch.allclose(one, other, atol=1e-5)


def test_the_bar_has_speed_and_what_is_left(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar("samples", quiet=False) as progress:
        assert progress is not None
        for done in range(1, 6):
            progress(done, 10)
            time.sleep(0.01)
    said = capsys.readouterr().err
    assert "/s" in said
    assert "0:0" in said


# Folders


# Several processes


# Refusals


@pytest.mark.takes_seconds
@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("sd", "--prompts nowhere.txt", "no file of prompts nowhere.txt"),
        ("sd", "--prompts empty.txt", "empty.txt is empty: a prompt a line is needed"),
        ("sd", "--prompts latin.txt", "latin.txt is no text in UTF-8"),
        ("sd", "--prompts bad.jsonl", "bad.jsonl, line 2 is not JSON"),
        ("sd", "--prompts odd.jsonl", "odd.jsonl, line 1: seed is 'five'"),
        ("sd", "--prompts none.jsonl", "none.jsonl, line 1 has none of the keys text, prompt, label and seed"),
        ("sd", "--prompts two.txt --count 3", "--count 3: two.txt has 2 prompts, and sample i takes prompt i"),
        ("sd", "--prompts two.txt --first 2", "--first 2: two.txt has 2 prompts"),
        ("sd", "--prompts two.txt --seeds 1,2,3", "3 seeds and 2 prompts"),
        ("sd", "--prompt cat --labels 1", "labels [1]: the model has no classes"),
        ("sd", "--prompt cat --size 17", "size 17x17: both sides must be multiples of 2 pixels"),
        ("sd", "--prompt cat --size big", "--size 'big': pixels are needed, such as 768"),
        ("plain", "--prompts two.txt", "prompts ['a cat', 'dog']: this model has no text encoders"),
        ("plain", "--size 9", "size 9x9: both sides must be multiples of 2 pixels"),
        ("dit", "--size 16x24", "a DiTTransformer2DModel draws squares alone"),
        ("dit", "--labels hne", "unknown class 'hne': did you mean 'hen'?"),
        ("dit", "--labels 5", "labels [5]: the model has the classes 0 to 4"),
        ("classes", "--labels cat", "class 'cat': the names of this model's classes are not known"),
        ("plain", "--seeds 1,2 --count 2", "--seeds draws the first sample of each: leave out"),
        ("plain", "--seeds 1,x", "--seeds 1,x: whole numbers"),
        ("plain", "--dtype fp16", "dtype fp16 needs a GPU, and the device is the CPU: take bf16"),
        ("plain", "--dtype f16", "unknown dtype 'f16': did you mean 'fp16'?"),
        ("classes", "--labels \u00b2", "class '\u00b2': the names of this model's classes are not known"),
        ("dit", "--labels \u00b2", "unknown class '\u00b2'"),
        ("dit", "--labels=--5", "unknown class '--5'"),
        ("classes", "--labels ,", "--labels ,: classes with commas between are needed, such as 3,cat"),
        ("plain", "--size \u00b2", "--size '\u00b2': pixels are needed, such as 768"),
        ("plain", "--first -1", "first -1: at least one sample, from 0 on"),
    ],
)
def test_what_cannot_be_is_refused(name: str, words: str, said: str, refused: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "two.txt").write_text("a cat\ndog\n")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "bad.jsonl").write_text('{"text": "a cat"}\n{"text"\n')
    (tmp_path / "odd.jsonl").write_text('{"text": "a cat", "seed": "five"}\n')
    (tmp_path / "none.jsonl").write_text('{"caption": "a cat"}\n')
    assert said in refused(name, *words.split())


@pytest.mark.parametrize("out", ["x.npy", "x.png", "folder"])
def test_samples_that_are_no_numbers_are_refused(
    out: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(models / "plain", tmp_path / "broken")
    file = next((tmp_path / "broken").rglob("*.safetensors"))
    save_file({name: value.fill_(torch.nan) for name, value in load_file(file).items()}, file)
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "broken", "--count", "3", "--batch", "2", "--device", "cpu", "--out", out]) == 2
    assert "not finite for samples 0 to 1: " in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))
    assert not (tmp_path / "x.npy").exists()


def test_an_exact_field_has_nothing_to_cast(refused: Any, capsys: Any) -> None:
    assert main(["sample", "checkerboard", "--dtype", "bf16"]) == 2
    assert "CheckerboardField has no network: leave out its dtype" in capsys.readouterr().err


def test_sizes_that_a_network_cannot_draw() -> None:
    model = NetworkField(SD3(tiny_model("sd3")))
    assert signature.sized(model, (4, 8, 8), (12, 16)) == (4, 12, 16)
    with pytest.raises(ValueError, match="size 20x8: this SD3Transformer2DModel draws up to 16x16"):
        signature.sized(model, (4, 8, 8), (20, 8))
    flux = NetworkField(Flux(tiny_model("flux")))
    assert signature.sized(flux, (4, 128, 128), (8, 6)) == (4, 8, 6)
    with pytest.raises(ValueError, match="multiples of 2 pixels"):
        signature.sized(flux, (4, 128, 128), (8, 7))
    with pytest.raises(ValueError, match="no images"):
        signature.sized(model, (2,), (8, 8))


def test_the_shape_of_samples_of_a_size() -> None:
    model = NetworkField(SD3(tiny_model("sd3")))
    assert signature.shape_at(model, (12, 16)) == (4, 12, 16)
    model.latents = Latents(tiny_vae())
    side = model.latents.factor
    assert signature.shape_at(model, (4 * side, 6 * side)) == (4, 4, 6)
    assert signature.sized(model, None, (4 * side, 6 * side)) == (4, 4, 6)
    with pytest.raises(ValueError, match=f"both sides must be multiples of {side}"):
        signature.shape_at(model, (4 * side, 6 * side + 1))
