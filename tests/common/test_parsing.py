"""Values from files that may be anybody's: what is too much for one line of text is refused before it is built."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file, save_file
from toys.unet import tiny_student, tiny_unet

from fewstep.cli import main
from fewstep.commands import recipes
from fewstep.common.errors import TrainingError, briefly, refused, shortened, shown
from fewstep.common.parsing import parse_yaml
from fewstep.data import pairs
from fewstep.data.decode import check_side
from fewstep.latents.encoders import vae_identity
from fewstep.latents.vae import Latents
from fewstep.models.writing import moments_in
from fewstep.runs.export import export
from fewstep.runs.loading import load, open_run
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run
from fewstep.training import checkpoints
from fewstep.training.trackers import read_metrics

ALIASES = "x0: &x0 [lol]\n" + "".join(f"x{i + 1}: &x{i + 1} [{', '.join([f'*x{i}'] * 9)}]\n" for i in range(9))
MERGES = "x0: &x0 {a: 1}\n" + "".join(
    f"x{i + 1}: &x{i + 1} {{<<: [{', '.join([f'*x{i}'] * 9)}], b{i}: *x{i}}}\n" for i in range(9)
)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 3000 + "]" * 3000, "{a: " * 3000 + "1" + "}" * 3000, ALIASES, MERGES, "x: &x [*x]", "x: &x {<<: *x}",
        "x: " + "9" * 5000, "x: 2020-99-99", "x: !!python/name:os.sep", "x: " + "a" * (1 << 20),
    ],
)  # fmt: skip
def test_yaml_that_is_too_much_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_yaml(text)


def test_yaml_that_is_not_is_read() -> None:
    assert parse_yaml("a: &a {lr: 1e-3}\nb: {<<: *a, null: 2}\nc: [*a, *a]") == {
        "a": {"lr": 1e-3}, "b": {"lr": 1e-3, "null": 2}, "c": [{"lr": 1e-3}] * 2,
    }  # fmt: skip


def test_errors_show_no_more_than_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown("x" * 50_000) == "'" + "x" * 37 + "..." + "x" * 38 + "'"
    assert shortened("a  b\nc") == "a b c"
    assert briefly(ValueError("a\nb")) == "a b"
    assert briefly(ValueError()) == briefly(ValueError(" ")) == "ValueError"
    assert len(briefly(ValueError("x " * 1000))) <= 160
    assert len(shortened("x " * 1000)) <= 400
    assert main(["distill", "checkerboard-itvm", "--dry-run", "--training.lr", "x" * 50_000]) == 2
    assert main(["sample", "y" * 50_000]) == 2
    assert main(["sample", "runs/no", "--sede", "z" * 50_000]) == 2
    assert all(len(line) <= 400 for line in capsys.readouterr().err.split("\n"))


def test_a_border_to_other_peoples_code_is_one_line() -> None:
    said = r"^diffusers cannot make X \(ZeroDivisionError: .*\): fetch it again$"
    with pytest.raises(ValueError, match=said), refused("diffusers cannot make X", "fetch it again"):
        _ = 1 // 0


def _one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(words) in (1, 2)
    lines = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert len(lines[0]) <= 400


@pytest.mark.takes_seconds
def test_odd_flags_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    _one_line(["export", "runs/x", "--format=--"], "-- is no value", capsys)
    _one_line(["compare", "runs/x", "--out", "a\0b"], "has a byte of zero in it", capsys)
    groups = "{block_out_channels: [8, 8], norm_num_groups: 0}"
    _one_line(["train", "digits-teacher", "--dry-run", "--student.options", groups], "UNet2DModel", capsys)
    blocks = "down_block_types: [DownBlock2D, DownBlock2D], up_block_types: [UpBlock2D, UpBlock2D]"
    no_heads = (
        f"{{block_out_channels: [4, 4], attention_head_dim: 8, norm_num_groups: 2, num_class_embeds: 10, {blocks}}}"
    )
    heads = ["--student.options", no_heads]
    for command in ("train", "plan"):
        words = [command, "digits-teacher", *heads, *(["--dry-run"] if command == "train" else [])]
        _one_line(words, "by zero", capsys)
    layers = "{layers_per_block: 2147483648}"
    _one_line(["train", "digits-teacher", "--dry-run", "--student.options", layers], "1,000 is the most", capsys)
    wide = "{width: 2147483648}"
    _one_line(["distill", "checkerboard-itvm", "--dry-run", "--student.options", wide], "width 2147483648", capsys)


def test_memory_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes" * 20)):

        def full(*_: object, error: Exception = error) -> int:
            raise error

        monkeypatch.setattr(recipes, "run", full)
        _one_line(["recipes"], "there is not enough memory for this: ask for fewer or smaller samples", capsys)

    def broken(*_: object) -> int:
        raise RuntimeError("a fault of fewstep's own")

    monkeypatch.setattr(recipes, "run", broken)
    with pytest.raises(RuntimeError, match="own"):
        main(["recipes"])


def test_what_libraries_log_is_short(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    factory = logging.getLogRecordFactory()
    monkeypatch.setattr(recipes, "run", lambda *_: logging.getLogger("x").warning("cut: %s", "a " * 9999) or 0)
    assert main(["recipes"]) == 0
    assert len(caplog.messages[0]) < 400
    assert logging.getLogRecordFactory() is factory


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_pairs_of_other_types_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    facts = {"count": 2, "shard": 2, "shape": [3], "labels": None}
    rows = {"noise": torch.ones(2, 3), "data": torch.ones(2, 3)}
    save_file(rows, tmp_path / "pairs-00000.safetensors")
    assert pairs.read_shard(tmp_path, facts, 0).keys() == rows.keys()
    save_file({**rows, "data": rows["data"].to(dtype)}, tmp_path / "pairs-00000.safetensors")
    with pytest.raises(ValueError, match="has data of torch"):
        pairs.read_shard(tmp_path, facts, 0)


@pytest.mark.parametrize("size", ["0", "-1", "2147483648", "true", "1.5"])
def test_sides_of_pictures_that_cannot_be(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"size=.*: the side of an image is a whole number of pixels, 1 to 16384"):
        check_side(yaml.safe_load(size))
    _one_line(["sample", "eight-gaussians", "--size", "2147483648"], "16384 pixels at most", capsys)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of points."""
    out = tmp_path_factory.mktemp("hostile") / "run"
    recipe = {
        "name": "run", "teacher": "eight-gaussians", "data": "eight-gaussians", "objective": "ITVM",
        "student": {"network": "mlp", "options": {"width": 8, "depth": 1}},
        "training": {"steps": 1, "batch": 8, "quiet": True}, "evaluation": {"count": 0},
    }  # fmt: skip
    run(load_recipe(recipe), out)
    return out


def _copied(trained: Path, tmp_path: Path) -> tuple[Path, Path]:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run", next((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.takes_seconds
@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(step="one"),
        lambda state: state.update(files=[]),
        lambda state: state["fingerprint"].update(data_shape="x"),
        lambda state: state["fingerprint"].update(data_shape=[-2]),
        lambda state: state["fingerprint"].update(data_moments=[0, -0.5]),
        lambda state: state.pop("fingerprint"),
    ],
)
def test_a_state_that_is_sealed_and_wrong_is_damaged(
    change: Callable[[dict[str, Any]], Any], trained: Path, tmp_path: Path
) -> None:
    out, path = _copied(trained, tmp_path)
    state = json.loads((path / "state.json").read_text())["state"]
    change(state)
    (path / "state.json").write_text(checkpoints.seal(state))
    with pytest.raises((TrainingError, ValueError), match=r"state\.json|belongs to another recipe|says what"):
        open_run(out)


def test_weights_of_another_shape_are_named(trained: Path, tmp_path: Path) -> None:
    out, path = _copied(trained, tmp_path)
    longer = lambda tensors: tensors.update({k: torch.cat([v.flatten(), torch.ones(1)]) for k, v in tensors.items()})  # noqa: E731
    _changed(path, "ema.safetensors", longer)
    with pytest.raises(ValueError, match="are not those of the student that the recipe describes: size mismatch"):
        open_run(out)


@pytest.mark.parametrize("line", ['"a b"', "{}", '{"step": "1"}', "[" * 3000])
def test_lines_of_metrics_that_are_no_records_are_named(line: str, trained: Path, tmp_path: Path) -> None:
    out, _ = _copied(trained, tmp_path)
    with (out / "metrics.jsonl").open("a") as lines:
        lines.write(f"{line}\n")
    with pytest.raises(ValueError, match=r"line \d of .*metrics\.jsonl is n"):
        read_metrics(out / "metrics.jsonl")


@pytest.mark.parametrize(
    ("key", "value"), [("norm_num_groups", True), ("norm_eps", "x"), ("block_out_channels", [True])]
)
def test_numbers_of_an_export_are_numbers(key: str, value: Any, tmp_path: Path) -> None:
    export(tiny_student(), tmp_path / "made")
    file = tmp_path / "made" / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ValueError, match=rf"config\.json: {key} is .*, and numbers are needed"):
        load(tmp_path / "made")


@pytest.mark.parametrize("key", ["latent_channels", "in_channels", "block_out_channels"])
@pytest.mark.parametrize("value", [-1, "x", {"a": 1}])
def test_numbers_of_a_vae_are_numbers(key: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", key: value}))
    with pytest.raises(ValueError, match=rf"the config of .* has .*{key} .* needed"):
        Latents(tmp_path)


def test_weights_that_are_a_pipe_are_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    os.mkfifo(tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises((ValueError, FileNotFoundError), match=r"a pipe and no file|no weights|is missing"):
        vae_identity(Latents(tmp_path))


@pytest.mark.parametrize("out", ["x.png", "x"])
def test_counts_without_end_are_one_line(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(tiny_student(), tmp_path / "made")
    words = ["sample", str(tmp_path / "made"), "--device", "cpu", "--out", str(tmp_path / out), "--count"]
    _one_line([*words, "9" * 40], "10,000,000 samples at most", capsys)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", ["run.json", "recipe.yaml", "metrics.jsonl", "quality.json"])
def test_a_pipe_in_a_run_is_not_waited_for(name: str, trained: Path, tmp_path: Path) -> None:
    out, _ = _copied(trained, tmp_path)
    (out / name).unlink(missing_ok=True)
    os.mkfifo(out / name)
    command = [sys.executable, "-m", "fewstep", "train", str(out), "--steps", "1", "--training.quiet", "true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 2), done.stderr


@pytest.mark.parametrize("command", ["sample", "compare", "plan", "cite", "export"])
def test_names_that_are_too_long_are_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    _one_line([command, "x" * 50_000, *(["made"] if command == "export" else [])], "cannot be used as a file", capsys)


def _changed(path: Path, file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Other tensors in a file of a checkpoint, sealed as if they had been written so."""
    tensors = load_file(path / file)
    change(tensors)
    save_file(tensors, path / "new")
    (path / "new").rename(path / file)
    state = json.loads((path / "state.json").read_text())["state"]
    state["files"][file] = {"bytes": (path / file).stat().st_size, "sha256": checkpoints._digest(path / file)}
    (path / "state.json").write_text(checkpoints.seal(state))


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("0.exp_avg_sq"),
        lambda tensors: tensors.pop("0.step"),
        lambda tensors: tensors.update({"0.exp_avg": torch.zeros(1)}),
        lambda tensors: tensors.update({"999.exp_avg": torch.zeros(1)}),
    ],
)
def test_moments_of_an_optimizer_are_whole(change: Callable[..., Any], trained: Path, tmp_path: Path) -> None:
    out, path = _copied(trained, tmp_path)
    _changed(path, "optimizer-student.safetensors", change)
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    with pytest.raises((ValueError, TrainingError), match="is no checkpoint that this run can go on from"):
        run(load_recipe(recipe, {"steps": "2"}), out)


def test_a_run_is_not_its_own_teacher(trained: Path, tmp_path: Path) -> None:
    out, path = _copied(trained, tmp_path)
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    recipe["teacher"] = {"source": str(out)}
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    state = json.loads((path / "state.json").read_text())["state"]
    state["fingerprint"]["teacher.source"] = str(out)
    (path / "state.json").write_text(checkpoints.seal(state))
    with pytest.raises((ValueError, TrainingError), match=r"made from itself|another recipe"):
        open_run(out)


@pytest.mark.parametrize("moments", [-0.5, [0, -0.5], "x", [1], [0, 0], {}])
def test_moments_that_cannot_be_are_refused(moments: Any, tmp_path: Path) -> None:
    (tmp_path / "fewstep.json").write_text(json.dumps({"_fewstep_version": "0.1.0", "moments": moments}))
    with pytest.raises(ValueError, match=r"fewstep\.json is not as fewstep writes it, moments"):
        moments_in(tmp_path)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("scheduler/scheduler_config.json", "num_train_timesteps", 1 << 40),
        ("scheduler/scheduler_config.json", "num_train_timesteps", "many"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", -1),
        ("scheduler/scheduler_config.json", "beta_schedule", ["linear"]),
        ("unet/config.json", "norm_num_groups", 0),
        ("unet/config.json", "norm_num_groups", 3),
        ("unet/config.json", "block_out_channels", "x"),
        ("unet/config.json", "layers_per_block", 1 << 31),
        ("unet/config.json", "down_block_types", [["DownBlock2D"], 3]),
        ("unet/config.json", "in_channels", "x"),
        ("unet/config.json", "out_channels", -1),
        ("unet/config.json", "sample_size", {}),
        ("unet/config.json", "sample_size", [8]),
        ("unet/config.json", "sample_size", 0),
    ],
)
def test_configs_with_values_that_cannot_be_are_one_line(file: str, key: str, value: Any, tmp_path: Path) -> None:
    DDPMPipeline(unet=tiny_unet(), scheduler=DDPMScheduler()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps({**config, key: value}))
    with pytest.raises(ValueError, match=r"."):
        load(tmp_path)
    (tmp_path / file).write_text("[" * 3000 + "]" * 3000)
    with pytest.raises(ValueError, match="is not JSON"):
        load(tmp_path)
