"""Weights read a tensor at a time: packed as they come, and those that bitsandbytes quantised made whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from toys.families import MODELS, conditions, ddim, tiny_model

from fewstep.common.model_files import load_weights
from fewstep.common.streamed import put_whole, streamed
from fewstep.models.diffusers_pipeline import load_field
from fewstep.networks.frozen_base import PackedLinear, keep_base, keeping
from fewstep.runs.loading import load, teacher_of
from fewstep.runs.recipes import load_recipe

WEIGHTS = "diffusion_pytorch_model.safetensors"


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A bare model of a family, with a scheduler beside it."""
    tiny_model(name).to(dtype).save_pretrained(folder, **options)
    scheduler = ddim() if name in ("sd", "dit") else diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.save_pretrained(folder)
    return folder


def everything(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those that are not saved too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def check_equal(ours: Any, theirs: Any) -> None:
    a, b = everything(ours), everything(theirs)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype, name
        assert torch.equal(value, b[name]), name
    kinds = [{name: type(part) for name, part in model.named_modules()} for model in (ours, theirs)]
    assert kinds[0] == kinds[1]


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_read_as_diffusers_reads_it(tmp_path: Path, name: str) -> None:
    folder = saved(name, tmp_path, torch.bfloat16, max_shard_size="20KB")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
    kind = getattr(diffusers, MODELS[name][0])
    check_equal(streamed(kind, folder, files), load_weights(kind, folder))


@pytest.mark.parametrize("base", ["bfloat16", "int8", "nf4"])
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_it_is_packed_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, base: str) -> None:
    if base != "bfloat16":
        pytest.importorskip("bitsandbytes")
    folder = saved(name, tmp_path, torch.float16)
    whole = load_field(folder)
    keep_base(base, whole.network.requires_grad_(False))
    kind = getattr(diffusers, MODELS[name][0])
    monkeypatch.setattr(kind, "from_pretrained", None)  # which would make it whole
    recipe = {
        "name": "kept", "teacher": str(folder), "data": "teacher", "objective": "ITVM",
        "student": {"lora": {"rank": 2, "base": base}}, "training": {"steps": 1},
    }  # fmt: skip
    teacher: Any = teacher_of(load_recipe(recipe))
    check_equal(teacher.network, whole.network)
    assert any(isinstance(part, PackedLinear) for part in teacher.network.modules()) == (base != "bfloat16")


def quantise(folder: Path, kind: str, nested: bool = False) -> dict[str, torch.Tensor]:
    """Have bitsandbytes quantise the attention of a model in a folder, as diffusers saves it; the weights by then."""
    functional = pytest.importorskip("bitsandbytes").functional
    weights, whole = load_file(folder / WEIGHTS), {}
    for name in [name for name in weights if ".attn" in name and name.endswith("weight") and weights[name].ndim == 2]:
        weight = weights[name].float()
        if kind == "int8":
            weights[name], scale, _ = functional.int8_vectorwise_quant(weight)
            weights[name.removesuffix("weight") + "SCB"] = scale
            weights[name.removesuffix("weight") + "weight_format"] = torch.tensor(0, dtype=torch.uint8)
            whole[name] = functional.int8_vectorwise_dequant(weights[name], scale)
            continue
        weight = weight.repeat(8, 4)[: len(weight), : weight.shape[1]].contiguous()
        values, state = functional.quantize_4bit(
            weight.to(torch.bfloat16), blocksize=64, quant_type=kind, compress_statistics=nested
        )
        weights[name] = values
        weights |= {f"{name}.{rest}": value for rest, value in state.as_dict(packed=True).items()}
        state.dtype, state.shape = torch.float32, torch.Size((weight.numel() // 64, 64))  # as the CPU does it rightly
        whole[name] = functional.dequantize_4bit(values, state).view(weight.shape)
    assert len(whole) > 3
    save_file(weights, folder / WEIGHTS)
    said = {"quant_method": "bitsandbytes", "load_in_8bit": kind == "int8", "load_in_4bit": kind != "int8"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    return whole


@pytest.mark.parametrize(("kind", "nested"), [("nf4", False), ("nf4", True), ("fp4", True), ("int8", False)])
def test_what_bitsandbytes_quantised_is_made_whole_as_it_does(tmp_path: Path, kind: str, nested: bool) -> None:
    folder = saved("sd3", tmp_path, torch.bfloat16)
    before: Any = load(folder)
    whole = quantise(folder, kind, nested)
    field: Any = load(folder)
    weights = dict(field.network.model.named_parameters())
    for name, value in whole.items():
        assert weights[name].dtype == torch.float32
        torch.testing.assert_close(weights[name], value, rtol=1e-6, atol=0)
    x, cond = torch.randn(2, *field.network.shape), conditions("sd3")
    with torch.no_grad():
        given, expected = field(x, 0.4, **cond), before(x, 0.4, **cond)
    assert 0 < (given - expected).abs().max() < 0.3 * expected.abs().max()
    assert "quantization_config" not in field.network.model.config
    if kind == "nf4" and not nested:  # packed anew it is what it was
        packed = load_field(folder, base="nf4").network.model
        for name, value in whole.items():
            layer: Any = packed.get_submodule(name.removesuffix(".weight"))
            assert torch.equal(layer.whole, value)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ("absmax", r"attn.* in .* cannot be made whole \(.*scales for .* numbers in blocks of 64"),
        ("quant_map", r"cannot be made whole \(IndexError"),
        ("quant_state", r"cannot be made whole \(JSONDecodeError"),
        ("gone", r"cannot be made whole \(KeyError"),
        ("shape", r"not those of its config.json: .* there and \(16, 16\) here"),
        ("missing", r"1 are missing, one is 'pos_embed"),
        ("more", r"1 are unexpected, one is 'odd.weight'"),
    ],
)
def test_damage_is_named(tmp_path: Path, harm: str, says: str) -> None:
    folder = saved("sd3", tmp_path)
    name = min(quantise(folder, "nf4"))
    weights = load_file(folder / WEIGHTS)
    state = f"{name}.quant_state.bitsandbytes__nf4"
    if harm == "absmax":
        weights[f"{name}.absmax"] = weights[f"{name}.absmax"][1:].clone()
    elif harm == "quant_map":
        weights[f"{name}.quant_map"] = weights[f"{name}.quant_map"][:3].clone()
    elif harm == "quant_state":
        weights[state] = weights[state][:-3].clone()
    elif harm == "gone":
        del weights[f"{name}.absmax"]
    elif harm == "shape":
        said = json.loads(bytes(weights[state].tolist())) | {"shape": [8, 32]}
        weights[state] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    elif harm == "missing":
        del weights["pos_embed.proj.bias"]
    else:
        weights["odd.weight"] = torch.zeros(1)
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(ValueError, match=says):
        load(folder)


def test_what_others_quantised_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = saved("sd3", tmp_path / "teacher")
    config = json.loads((folder / "config.json").read_text())
    for kind in ("torchao", "quanto", "gguf"):
        said = json.dumps({**config, "quantization_config": {"quant_method": kind}})
        (folder / "config.json").write_text(said)
        with pytest.raises(ValueError, match=rf"are quantised \('{kind}'\), .* take the model as it was before"):
            load(folder)


def test_attention_by_its_old_names_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    options = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 8}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    diffusers.UNet2DModel(**options, **blocks, attention_head_dim=4).save_pretrained(folder)
    weights = load_file(folder / WEIGHTS)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, value in weights.items():
        for new, before in names.items():
            key = key.replace(f".{new}.", f".{before}.")
        old[key] = value
    assert old.keys() != weights.keys()
    save_file(old, folder / WEIGHTS)
    shutil.copytree(folder, tmp_path / "again")
    model = streamed(diffusers.UNet2DModel, folder, [folder / WEIGHTS], put_whole)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in weights.items())
    assert keeping("float32") is None
