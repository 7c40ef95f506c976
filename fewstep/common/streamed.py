"""The weights of a diffusers model, read a tensor at a time into a model that has none yet: at no time is more than one
of them in memory beside what is kept. Those that bitsandbytes quantised are made whole, with torch alone."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fewstep.common.errors import refused, shown

Put = Callable[[str, Tensor], None]
Keep = Callable[[nn.Module], Put]
_STATE = re.compile(r"quant_state\.bitsandbytes__\w+")


def check_quantisation(config: Mapping[str, Any], folder: Path) -> bool:
    """Whether the weights in a folder are quantised, by the config beside them.

    Raises:
        ValueError: they are, in a way that is not read here.
    """
    packed = config.get("quantization_config")
    if not packed:
        return False
    kind = packed.get("quant_method") if isinstance(packed, Mapping) else packed
    if not str(kind).startswith("bitsandbytes"):
        raise ValueError(
            f"the weights in {folder} are quantised ({shown(kind)}), and those of bitsandbytes alone are read: take "
            "the model as it was before; student.lora.base: nf4 then keeps a frozen one in 4 bits"
        )
    return True


def streamed(model_class: Any, folder: Path, files: Iterable[Path], keep: Keep | None = None, **said: Any) -> Any:
    """A diffusers model with the weights in its folder, which are exactly its own.

    Args:
        files: of the weights, as safetensors.
        keep: given the model without numbers, what puts each of its tensors into it; as float32, if not given.
        said: what its config does not say, or says otherwise.

    Raises:
        ValueError: the weights are not those of its config.json, or cannot be made whole.
    """
    config = {name: value for name, value in model_class.load_config(folder).items() if name != "quantization_config"}
    with without_weights():
        model = model_class.from_config(config, **said)
    model.register_to_config(_name_or_path=str(folder))
    stored = _Stored(files)
    names = {name: name for name in stored.names}
    model._fix_state_dict_keys_on_load(names)  # as attention was called before
    wrong = f"the weights in {folder} are not those of its config.json"
    own: dict[str, Tensor] = model.state_dict()
    ignored = model_class._keys_to_ignore_on_load_unexpected or []
    unexpected = [name for name in names.keys() - own.keys() if not any(re.search(one, name) for one in ignored)]
    for what, odd in (("missing", own.keys() - names.keys()), ("unexpected", unexpected)):
        if odd:
            raise ValueError(f"{wrong}: {len(odd)} are {what}, one is {min(odd)!r}")
    put = put_whole(model) if keep is None else keep(model)
    for name, like in own.items():
        with refused(f"{names[name]} in {folder} cannot be made whole", "fetch it again"):
            value = stored.whole(names[name])
        if value.shape != like.shape:
            raise ValueError(f"{wrong}: {name!r} is {tuple(value.shape)} there and {tuple(like.shape)} here")
        put(name, value)
    return model.eval()


def put_whole(model: nn.Module) -> Put:
    """Puts tensors into a model in the types that it has for them."""

    def put(name: str, value: Tensor) -> None:
        above, _, last = name.rpartition(".")
        part = model.get_submodule(above)
        if (parameter := part._parameters.get(last)) is not None:
            part._parameters[last] = nn.Parameter(value.to(parameter.dtype), requires_grad=parameter.requires_grad)
        else:
            part._buffers[last] = value.to(getattr(part, last).dtype)

    return put


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules that are made inside have parameters without numbers, on the meta device, and buffers as ever."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None:
            self._parameters[name] = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


class _Stored:
    """The tensors of some files, without what bitsandbytes keeps beside those that it quantised (``names``)."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files: dict[str, Path] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                self._files |= dict.fromkeys(opened.keys(), file)
        self._beside: dict[str, list[str]] = {}
        for name in self._files:
            weight, found, rest = name.partition(".weight.")
            if found and f"{weight}.weight" in self._files:
                self._beside.setdefault(f"{weight}.weight", []).append(rest)
            above, _, last = name.rpartition(".")
            if last in ("SCB", "weight_format") and f"{above}.weight" in self._files:
                self._beside.setdefault(f"{above}.weight", []).append(last)
        beside = {self._place(weight, rest) for weight, found in self._beside.items() for rest in found}
        self.names = [name for name in self._files if name not in beside]

    def whole(self, name: str) -> Tensor:
        """One of them, on memory of its own, in float32 where it was quantised."""
        beside = {rest: self._read(self._place(name, rest)) for rest in self._beside.get(name, [])}
        value = self._read(name)
        if "SCB" in beside:
            return value.float() * (beside["SCB"].float() / 127)[:, None]
        state = next((rest for rest in beside if _STATE.fullmatch(rest)), None)
        return value if state is None else _of_four_bits(value, beside, json.loads(bytes(beside[state].tolist())))

    def _place(self, weight: str, rest: str) -> str:
        return f"{weight.removesuffix('weight')}{rest}" if rest in ("SCB", "weight_format") else f"{weight}.{rest}"

    def _read(self, name: str) -> Tensor:
        # Opened anew for each: what was read of a file stays in memory until it is closed.
        with safe_open(self._files[name], framework="pt") as opened:
            return opened.get_tensor(name).clone()


def _of_four_bits(value: Tensor, beside: Mapping[str, Tensor], state: Mapping[str, Any]) -> Tensor:
    """A weight of two numbers a byte, by bitsandbytes (QLoRA, arXiv 2305.14314): entries of a table of 16, times the
    scale of their block, which may be quantised itself."""
    scale, shape = beside["absmax"], tuple(state["shape"])
    if "nested_absmax" in beside:
        steps = beside["nested_quant_map"][scale.long()]
        steps = _by_blocks(steps, beside["nested_absmax"], state["nested_blocksize"])
        scale = steps + torch.tensor(float(state["nested_offset"]))
    packed = value.view(torch.uint8).flatten()
    entries = torch.stack([packed >> 4, packed & 15], 1).flatten()[: prod(shape)]
    return _by_blocks(beside["quant_map"][entries.long()], scale, state["blocksize"]).view(shape)


def _by_blocks(values: Tensor, scale: Tensor, size: int) -> Tensor:
    if len(scale) != -(-len(values) // size):
        raise ValueError(f"{len(scale)} scales for {len(values)} numbers in blocks of {size}")
    return values * scale.float().repeat_interleave(size)[: len(values)]
