"""Adapters as each version of diffusers' own scripts saved them: read to what diffusers makes of the same file."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor
from toys.families import conditions, ddim, tiny_model

from fewstep.flows.fields import DiffusionField
from fewstep.models.adapter_files import DIFFUSERS_FILE, load_adapter, save_adapter
from fewstep.models.lora import merge_lora
from fewstep.networks import ConditionalUNet

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
    torch.testing.assert_close(output(loaded.network), output(ConditionalUNet(expected)), rtol=0, atol=2e-5)
    torch.testing.assert_close(output(merge_lora(loaded).network), output(loaded.network), rtol=0, atol=2e-5)
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
        torch.testing.assert_close(output(theirs), output(ConditionalUNet(expected)), rtol=0, atol=2e-5)
    check(tmp_path, expected)
    loaded = field()
    load_adapter(loaded, tmp_path / DIFFUSERS_FILE)  # the file itself
    torch.testing.assert_close(output(loaded.network), output(ConditionalUNet(expected)), rtol=0, atol=2e-5)


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
        ({"lora_unet_input_blocks_1_1.lora_down.weight": torch.zeros(2, 2)}, "has no layer lora_unet_input_blocks_1_1"),
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
