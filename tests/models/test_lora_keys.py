"""Adapters as each version of diffusers' own scripts saved them: read to what diffusers makes of the same file."""

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor
from toys.families import conditions, ddim, tiny_model
from toys.videos import wan_model

from fewstep.flows.fields import DiffusionField
from fewstep.models.adapter_files import DIFFUSERS_FILE, load_adapter, save_adapter
from fewstep.models.lora import merge_lora
from fewstep.networks import FAMILIES, ConditionalUNet

LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
X, TIME = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10.0, 700.0])


def weights(ranks: tuple[int, ...] = (2,)) -> dict[str, Tensor]:
    """Random ones of all attention layers of a U-Net, by the names of peft."""
    draw, found = torch.Generator().manual_seed(1), {}
    layers = [(n, m) for n, m in tiny_model("sd").named_modules() if n.endswith(LAYERS) and "attn" in n]
    for k, (name, layer) in enumerate(layers):
        rank = ranks[k % len(ranks)]
        found[f"{name}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=draw)
        found[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=draw)
    return found


def down_up(name: str, down: str, up: str) -> str:
    return name.replace(".lora_A.", down).replace(".lora_B.", up)


def processors(name: str) -> str:
    """As attention processors held them: ``attn1.processor.to_q_lora.down.weight``."""
    name = down_up(name, "_lora.down.", "_lora.up.").replace("to_out.0_lora", "to_out_lora")
    return name.replace(".to_", ".processor.to_")


# How a name of peft is written, and the versions of diffusers that did so.
STYLES: dict[str, Callable[[str], str]] = {
    "peft, of today": lambda name: f"unet.{name}",
    "0.22 to 0.26": lambda name: "unet." + down_up(name, ".lora.down.", ".lora.up."),
    "0.17 to 0.21": lambda name: f"unet.{processors(name)}",
    "unprefixed, to 0.16": processors,
    "unprefixed, peft": lambda name: name,
    "unprefixed, down and up": lambda name: down_up(name, ".lora.down.", ".lora.up."),
    "kohya": lambda name: (
        "lora_unet_"
        + down_up(name.removesuffix(".weight") + ".", ".lora_A.", ".lora_B.")
        .replace(".lora_A.", "|lora_down.weight")
        .replace(".lora_B.", "|lora_up.weight")
        .replace(".", "_")
        .replace("|", ".")
        .replace("_weight", ".weight")
    ),
}


def field() -> DiffusionField:
    return DiffusionField(ConditionalUNet(tiny_model("sd")), ddim())


def by_hand(state: dict[str, Tensor], scale: Callable[[str, int], float]) -> Any:
    """The model with ``scale B A`` added to each layer."""
    model = tiny_model("sd")
    with torch.no_grad():
        for name, down in state.items():
            if ".lora_A." in name:
                layer = name.removesuffix(".lora_A.weight")
                up = state[name.replace("lora_A", "lora_B")]
                model.get_submodule(layer).weight += scale(layer, len(down)) * up @ down
    return model


@torch.no_grad()
def output(network: Any) -> Tensor:
    return network(X, TIME, **conditions("sd"))


def check(folder: Path, expected: Any) -> None:
    """The adapter in a folder gives what is expected, and so does what is saved of it."""
    loaded = field()
    load_adapter(loaded, folder)
    torch.testing.assert_close(output(loaded.network), output(ConditionalUNet(expected)), rtol=0, atol=1e-4)
    torch.testing.assert_close(output(merge_lora(loaded).network), output(loaded.network), rtol=0, atol=1e-4)
    again = field()
    load_adapter(again, save_adapter(loaded, folder / "again"))
    assert torch.equal(output(again.network), output(loaded.network))


def by_diffusers(folder: Path) -> Any:
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe: Any = StableDiffusionPipeline(unet=tiny_model("sd"), scheduler=ddim(), requires_safety_checker=False, **none)  # pyright: ignore
    pipe.load_lora_weights(folder, weight_name=DIFFUSERS_FILE)
    return pipe.unet


@pytest.mark.takes_seconds
@pytest.mark.parametrize("style", list(STYLES))
def test_each_style_is_read_as_diffusers_reads_it(style: str, tmp_path: Path) -> None:
    state = weights()
    save_file({STYLES[style](name): value for name, value in state.items()}, tmp_path / DIFFUSERS_FILE)
    expected = by_hand(state, lambda _, rank: 1.0)
    assert not torch.allclose(output(ConditionalUNet(expected)), output(field().network), atol=1e-3)
    if not style.startswith(("unprefixed", "kohya")):  # which diffusers of today passes over, or has by other names
        theirs = ConditionalUNet(by_diffusers(tmp_path))
        torch.testing.assert_close(output(theirs), output(ConditionalUNet(expected)), rtol=0, atol=1e-4)
    check(tmp_path, expected)
    loaded = field()
    load_adapter(loaded, tmp_path / DIFFUSERS_FILE)  # the file itself
    torch.testing.assert_close(output(loaded.network), output(ConditionalUNet(expected)), rtol=0, atol=1e-4)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("style", ["0.22 to 0.26", "kohya"])
def test_alphas_and_ranks_of_each_layer(style: str, tmp_path: Path) -> None:
    """Without alphas the scale is 1 whatever the rank; with them it is alpha / rank, layer by layer."""
    state = weights((2, 3, 2))
    saved = {STYLES[style](name): value for name, value in state.items()}
    save_file(saved, tmp_path / DIFFUSERS_FILE)
    check(tmp_path, by_hand(state, lambda _, rank: 1.0))
    layers = [name.removesuffix(".lora_A.weight") for name in state if ".lora_A." in name]
    alphas = {layer: float(1 + k % 3) for k, layer in enumerate(layers)}
    for layer, alpha in alphas.items():
        name = STYLES[style](f"{layer}.lora_A.weight")
        end = ".lora.down.weight" if style != "kohya" else ".lora_down.weight"
        saved[name.removesuffix(end) + ".alpha"] = torch.tensor(alpha)
    save_file(saved, tmp_path / DIFFUSERS_FILE)
    check(tmp_path, by_hand(state, lambda layer, rank: alphas[layer] / rank))


@pytest.mark.takes_seconds
def test_a_text_encoder_in_the_same_file_is_left_out_and_said(tmp_path: Path) -> None:
    state = weights()
    saved = {STYLES["0.22 to 0.26"](name): value for name, value in state.items()}
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight"
    save_file({**saved, name: torch.zeros(2, 16)}, tmp_path / DIFFUSERS_FILE)
    with pytest.warns(UserWarning, match=r"text encoders too \(1 weights\): it is left out"):
        check(tmp_path, by_hand(state, lambda _, rank: 1.0))
    save_file(saved, tmp_path / DIFFUSERS_FILE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(field(), tmp_path)


def test_what_is_no_adapter_of_this_model(tmp_path: Path) -> None:
    for saved, says in (
        ({"text_encoder.q_proj.lora_linear_layer.down.weight": torch.zeros(2, 2)}, "has no adapter of a unet"),
        ({"transformer.blocks.0.to_q.lora_A.weight": torch.zeros(2, 2)}, "has no layer transformer.blocks.0.to_q"),
        ({"lora_unet_input_blocks_1_1.lora_down.weight": torch.zeros(2, 2)}, "UNet2DConditionModel: diffusers cannot"),
        ({"lora_unet_input_blocks_1_1.hada_w1_a": torch.zeros(2, 2)}, r"is no plain LoRA \(lora_unet_.*hada_w1_a\)"),
        ({"a.lora_A.weight": torch.zeros(2, 2), "a.dora_scale": torch.zeros(2)}, r"is no plain LoRA \(a.dora_scale"),
    ):
        save_file(saved, tmp_path / DIFFUSERS_FILE)
        with pytest.raises(ValueError, match=says):
            load_adapter(field(), tmp_path)
    (tmp_path / DIFFUSERS_FILE).rename(tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(FileNotFoundError, match=r"no adapter in .*A \.bin can run code"):
        load_adapter(field(), tmp_path)


@pytest.mark.parametrize(
    "said", ["[" * 100_000, "3", "[]", "{", '{"unet.r": 2, "unet.rank_pattern": {"(": 2}}', '{"unet.r": "x"}']
)
def test_metadata_that_is_none_is_one_line(said: str, tmp_path: Path) -> None:
    state = {f"unet.{name}": value for name, value in weights().items()}
    save_file(state, tmp_path / DIFFUSERS_FILE, metadata={"lora_adapter_metadata": said})
    with pytest.raises(ValueError, match=f"{tmp_path}") as refused:
        load_adapter(field(), tmp_path)
    assert len(str(refused.value)) < 400


def by_sgm(layer: str) -> str:
    """A layer of the U-Net as kohya's scripts for SDXL call it, by the blocks of the first repository."""
    side, number, _, place, rest = layer.split(".", 4) if "mid" not in layer else ("mid", "", "", "", layer)
    if side == "mid":
        return "middle_block_1_" + rest.split(".", 3)[3].replace(".", "_")
    # Of one layer a block the way down has 2 places each, its first being conv_in; the way up has 2 too.
    at = 2 * int(number) + int(place) + (1 if side.startswith("down") else 0)
    return f"{'input' if side.startswith('down') else 'output'}_blocks_{at}_1_{rest.replace('.', '_')}"


@pytest.mark.takes_seconds
def test_blocks_by_the_numbers_of_the_first_repository(tmp_path: Path) -> None:
    state, saved = weights(), {}
    for name, value in state.items():
        layer, side = name.removesuffix(".weight").rsplit(".", 1)
        saved[f"lora_unet_{by_sgm(layer)}.lora_{'down' if side == 'lora_A' else 'up'}.weight"] = value
        saved[f"lora_unet_{by_sgm(layer)}.alpha"] = torch.tensor(1.0)
    save_file(saved, tmp_path / DIFFUSERS_FILE)
    check(tmp_path, by_hand(state, lambda _, rank: 1 / rank))


# Layers of Wan by its makers' names, which ComfyUI and musubi-tuner keep.
WAN = {
    f"{attn}.{theirs}": f"{own}.{name}"
    for attn, own in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for theirs, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
} | {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}


def low_rank(layers: dict[str, tuple[int, int]], name: Callable[[str], str]) -> dict[str, Tensor]:
    """Random pairs of rank 2 of layers of these (out, in) sizes, with an alpha of 1."""
    draw, found = torch.Generator().manual_seed(1), {}
    for layer, (gives, takes) in layers.items():
        found[f"{name(layer)}.lora_down.weight"] = torch.randn(2, takes, generator=draw)
        found[f"{name(layer)}.lora_up.weight"] = torch.randn(gives, 2, generator=draw)
        found[f"{name(layer)}.alpha"] = torch.tensor(1.0)
    return found


def of_wan(name: Callable[[str], str]) -> dict[str, Tensor]:
    model = wan_model()
    sizes = {
        f"blocks.{i}.{theirs}": tuple(model.get_submodule(f"blocks.{i}.{own}").weight.shape)
        for i in range(len(model.blocks))
        for theirs, own in WAN.items()
    }
    return low_rank(sizes, name)


def of_flux(name: Callable[[str], str]) -> dict[str, Tensor]:
    """By the names of Black Forest Labs, in which the three projections of an attention are one layer."""
    width = 16
    double = {"img_attn_qkv": 3, "img_attn_proj": 1, "txt_attn_qkv": 3, "txt_attn_proj": 1}
    sizes = {f"double_blocks.0.{layer}": (n * width, width) for layer, n in double.items()}
    inner = tiny_model("flux").single_transformer_blocks[0].proj_out.in_features
    return low_rank(sizes | {"single_blocks.0.linear2": (width, inner)}, name)


def kohya(layer: str) -> str:
    return f"lora_unet_{layer.replace('.', '_')}"


FOREIGN: dict[str, tuple[Callable[[], Any], Any, dict[str, Tensor], str]] = {
    "wan by ComfyUI": (wan_model, diffusers.WanPipeline, of_wan(lambda layer: f"diffusion_model.{layer}"), "wan"),
    "wan by musubi": (wan_model, diffusers.WanPipeline, of_wan(kohya), "wan"),
    "flux by kohya": (lambda: tiny_model("flux"), diffusers.FluxPipeline, of_flux(kohya), "flux"),
}


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", FOREIGN)
def test_the_names_of_other_tools_are_read_as_diffusers_reads_them(name: str, tmp_path: Path) -> None:
    make, kind, saved, family = FOREIGN[name]
    file = tmp_path / "my_style_v2.safetensors"  # as it is published: one file, by a name of its own
    save_file(saved, file)
    parts: Any = {key: None for key in inspect.signature(kind.__init__).parameters if key not in ("self", "args")}
    parts |= {"scheduler": FlowMatchEulerDiscreteScheduler(), "transformer": make()}
    pipe: Any = kind(
        **{key: value for key, value in parts.items() if key not in ("boundary_ratio", "expand_timesteps")}
    )
    pipe.load_lora_weights(tmp_path, weight_name=file.name)
    network = FAMILIES[type(pipe.transformer).__name__]
    loaded = DiffusionField(network(make()), FlowMatchEulerDiscreteScheduler())
    plain = DiffusionField(network(make()), FlowMatchEulerDiscreteScheduler())
    load_adapter(loaded, tmp_path)
    x = torch.randn(2, 4, *((2, 8, 8) if family == "wan" else (8, 8)), generator=torch.Generator().manual_seed(0))
    cond = conditions("flux") if family == "flux" else {"encoder_hidden_states": torch.randn(2, 8, 32)}
    with torch.no_grad():
        found, wanted = (model(x, TIME, **cond) for model in (loaded.network, network(pipe.transformer)))
        assert (found - plain.network(x, TIME, **cond)).abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_a_folder_of_several_files_is_asked_which(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"unet.a.lora_A.weight": torch.zeros(2, 2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match=r"there are one.safetensors, two.safetensors: name one"):
        load_adapter(field(), tmp_path)
