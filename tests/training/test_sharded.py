"""Sharded over processes, a training is the one that it is on one process: numbers, checkpoints, the model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toys.families import tiny_pipeline
from toys.sharded import launch, train

from fewstep.cli import main
from fewstep.common.errors import TrainingError
from fewstep.training import checkpoints

# By name: the twin, its method and options.
RUNS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "itvm": ("dit", "ITVM", {}),
    "psd": ("dit", "PSD", {"accumulate": 2}),
}
SCRIPT = f"""
import json, shutil, sys
from pathlib import Path
import torch.distributed as dist
from safetensors.torch import save_file
from toys.sharded import train
from fewstep.cli import main

folder, options = Path(sys.argv[1]), {{"shard": "fsdp2", "checkpoint_every": 3}}
for name, (twin, method, more) in json.loads({json.dumps(json.dumps(RUNS))}).items():
    result = train(twin, method, folder / name, **options, **more)
    save_file(result.ema.state_dict(), folder / f"{{name}}-{{dist.get_rank()}}.safetensors")
if dist.get_rank() == 0:
    shutil.copytree(folder / "itvm", folder / "again")
    shutil.rmtree(folder / "again/checkpoints/step-00000006")
dist.barrier()
for name in ("again", "from-one"):
    train("dit", "ITVM", folder / name, **options)
flags = "--steps 4 --training.batch 16 --training.chunk 4 --training.shard fsdp2 --training.device cpu --data.count 32"
flags += " --evaluation.count 0 --evaluation.every 2 --training.quiet true"
where = ["--teacher", str(folder / "pipeline"), "--data", "teacher", "--out", str(folder / "distilled")]
assert main(["distill", *where, *flags.split()]) == 0
"""


def middle(run: Path, copy: Path) -> Path:
    """A copy of a run that was stopped after step 3."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints/step-00000006")
    return copy


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trainings on one process, without shards."""
    folder = tmp_path_factory.mktemp("one")
    for name, (twin, method, options) in RUNS.items():
        train(twin, method, folder / name, checkpoint_every=3, **options)
    return folder


@pytest.fixture(scope="module")
def two(one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    middle(one / "itvm", folder / "from-one")
    tiny_pipeline("dit").save_pretrained(folder / "pipeline")
    launch(SCRIPT, folder, 2)
    return folder


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def tensors(out: Path, step: int = 6) -> dict[str, Tensor]:
    found = checkpoints.load(out / f"checkpoints/step-{step:08d}").tensors
    return {f"{group}/{name}": value for group, named in found.items() for name, value in named.items()}


def check_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=0, atol=1e-8, msg=key)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", RUNS)
def test_a_sharded_training_has_the_numbers_of_one_process(one: Path, two: Path, name: str) -> None:
    alone, together = lines(one / name), lines(two / name)
    assert len(alone) == len(together) == 6
    for a, b in zip(alone, together, strict=True):
        assert a.keys() == b.keys()
        for key in (key for key in a if key.startswith(("loss", "grad_norm"))):
            assert b[key] == pytest.approx(a[key], rel=1e-9), key
    check_alike(tensors(one / name), tensors(two / name))


@pytest.mark.takes_seconds
def test_it_goes_on_with_the_same_bits(two: Path) -> None:
    whole, again = tensors(two / "itvm"), tensors(two / "again")
    assert whole.keys() == again.keys()
    for key, value in whole.items():
        assert torch.equal(value, again[key]), key


@pytest.mark.takes_seconds
def test_it_goes_on_where_another_number_of_processes_stopped(one: Path, two: Path, tmp_path: Path) -> None:
    check_alike(tensors(one / "itvm"), tensors(two / "from-one"))
    train("dit", "ITVM", middle(two / "itvm", tmp_path / "whole"))
    check_alike(tensors(one / "itvm"), tensors(tmp_path / "whole"))
    train("dit", "ITVM", middle(two / "itvm", tmp_path / "alone"), shard="fsdp2")  # a shard of one process
    check_alike(tensors(one / "itvm"), tensors(tmp_path / "alone"))


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", RUNS)
def test_each_process_ends_with_the_whole_average(two: Path, name: str) -> None:
    kept = {key.removeprefix("ema/"): x for key, x in tensors(two / name).items() if key.startswith("ema/")}
    for rank in (0, 1):
        whole = load_file(two / f"{name}-{rank}.safetensors")
        assert kept.keys() <= whole.keys()
        assert all(torch.equal(whole[key], value) for key, value in kept.items())


@pytest.mark.takes_seconds
def test_a_recipe_is_watched_and_exported_as_any_other(two: Path, tmp_path: Path) -> None:
    run, export = two / "distilled", tmp_path / "export"
    assert {file.name for file in (run / "samples").iterdir()} == {"step-00000002.png", "step-00000004.png"}
    assert main(["export", str(run), str(export)]) == 0
    average = checkpoints.load(run / "checkpoints/step-00000004").tensors["ema"]
    exported = load_file(export / "transformer/diffusion_pytorch_model.safetensors")
    assert exported.keys() == {key.removeprefix("network.model.") for key in average}
    for key, value in average.items():
        assert torch.equal(exported[key.removeprefix("network.model.")], value), key


@pytest.mark.takes_seconds
def test_no_process_writes_what_another_keeps(two: Path) -> None:
    path = two / "itvm/checkpoints/step-00000006"
    files = sorted(path.glob("*.safetensors"))
    assert [file.name[:11] for file in files] == ["shard-00001", "shard-00002"]
    whole = sum(value.nbytes for value in tensors(two / "itvm").values())
    for file in files:  # to within the names of the tensors and rows that two do not share equally
        assert file.stat().st_size == pytest.approx(whole / 2, rel=0.15)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("harm", ["bytes", "missing", "more", "another"])
def test_damaged_shards_are_named(two: Path, tmp_path: Path, harm: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(two / "itvm", run)
    file = run / "checkpoints/step-00000006/shard-00002-model-00001-of-00001.safetensors"
    if harm == "bytes":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif harm == "missing":
        file.unlink()
    elif harm == "more":
        shutil.copy(file, file.with_name("shard-00003-model-00001-of-00001.safetensors"))
    else:  # whole by its hash, and yet not the other half
        first = file.with_name("shard-00001-model-00001-of-00001.safetensors")
        state = json.loads((file.parent / "state.json").read_text())["state"]
        shutil.copy(first, file)
        state["files"][file.name] = state["files"][first.name]
        (file.parent / "state.json").write_text(checkpoints.seal(state))
    with pytest.raises(TrainingError, match=r"shard.* Delete the folder .* to go back to step-00000003"):
        checkpoints.load(file.parent)
    with pytest.raises(TrainingError, match=r"Delete the folder"):
        train("dit", "ITVM", run, shard="fsdp2", steps=8)


def test_what_is_not_sharded_is_refused_in_a_line() -> None:
    for options, why in (
        ({"shard": "zero3"}, "unknown shard 'zero3': Known: fsdp2"),
        ({"offload": True}, "say shard: fsdp2 too"),
        ({"shard": "fsdp2", "precision": "fp16"}, "take bf16 or float32"),
        ({"shard": "fsdp2", "compile": True}, "leave one of them out"),
    ):
        with pytest.raises(ValueError, match=why):
            train("dit", "PSD", **options)
