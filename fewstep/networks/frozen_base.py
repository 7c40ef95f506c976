"""The frozen linear layers under an adapter, kept in fewer bytes: in bfloat16, in int8 or in the 4 bits of nf4."""

from collections.abc import Iterator
from copy import deepcopy
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.common.streamed import Keep, Put, put_whole

_BLOCK = 64  # weights of nf4 that share a scale, as bitsandbytes and diffusers have them
Packed = tuple[str, tuple[int, ...]]  # the kind, and the shape of the whole weight


class HalfLinear(nn.Linear):
    """A linear layer whose weight is in bfloat16 and whose input is in any type: the output is in that of the input.
    Under autocast the weight goes in as it is; else a copy of it is made for each call."""

    takes_any_type = True

    def forward(self, input: Tensor) -> Tensor:
        if input.is_meta:  # of a plan, which knows no autocast: without a copy, as under it
            bias = None if self.bias is None else self.bias.to(self.weight.dtype)
            return functional.linear(input.to(self.weight.dtype), self.weight, bias).to(input.dtype)
        is_cast = torch.is_autocast_enabled(input.device.type)
        weight = self.weight if is_cast else self.weight.to(input.dtype)
        return functional.linear(input, weight, self.bias)


class PackedLinear(nn.Linear):
    """A linear layer whose weight is kept in ``int8``, a scale for each output, or in ``nf4`` (QLoRA, arXiv
    2305.14314), a scale for 64 weights, and made whole for each product: the backward pass makes it again, so that
    nothing of full size is kept between them. The input is not rounded."""

    takes_any_type = True
    packed: Packed
    scale: nn.Parameter

    @property
    def whole(self) -> Tensor:
        """The weight in float32."""
        return _unpacked(self.weight, self.scale, self.packed, torch.float32)

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        if input.is_meta:  # of a plan, as above
            x = input.to(torch.bfloat16)
        else:
            x = input.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else input
        out: Any = _Product.apply(x, self.weight, self.scale, self.packed, True)
        out = out if self.bias is None else out + self.bias.to(out.dtype)
        return out.to(input.dtype) if input.is_meta else out


class _Product(torch.autograd.Function):
    """``x W^T``, or ``x W`` where it is not transposed, of a packed W: linear in x, to any order and in both modes."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, scale: Tensor, packed: Packed, transposed: bool) -> Tensor:
        whole = _unpacked(weight, scale, packed, x.dtype)
        return x @ (whole.T if transposed else whole)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, weight, scale, ctx.packed, ctx.transposed = inputs
        ctx.save_for_backward(weight, scale)
        ctx.save_for_forward(weight, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        back = _Product.apply(grads[0], *ctx.saved_tensors, ctx.packed, not ctx.transposed)
        return back, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Product.apply(tangents[0], *ctx.saved_tensors, ctx.packed, ctx.transposed)


def check_base(base: str) -> None:
    """That the library which packs is there.

    Raises:
        ImportError: it is not.
    """
    if base in ("int8", "nf4"):
        _packing(base)


def keep_base(base: str, *networks: nn.Module) -> None:
    """Keep the frozen linear layers of networks as ``base`` says, in place, and what trains in float32.

    * ``float32``: as they are.
    * ``bfloat16``: all of them in bfloat16.
    * ``int8``, ``nf4``: those of the blocks packed, which are nearly all, and the others in bfloat16. What embeds times
      and conditions is not packed: a student has copies of it that train.

    Networks that share their weights go in together, or one of them gets a copy.

    Raises:
        ImportError: bitsandbytes, which packs, is not installed.
        ValueError: no linear layer that could be packed.
    """
    if base == "float32":
        return
    if base != "bfloat16":
        _pack(base, networks)
    layers: list[Any] = [layer for network in networks for layer in network.modules()]
    for layer in layers:
        for weight in layer.parameters(recurse=False):
            if weight.requires_grad and weight.dtype == torch.bfloat16:  # new, and begun as a copy of what is halved
                weight.data = weight.data.float()
        if type(layer) in (nn.Linear, HalfLinear) and not layer.weight.requires_grad:
            layer.weight.data = layer.weight.data.to(torch.bfloat16)
            layer.__class__ = HalfLinear


def keeping(base: str) -> Keep | None:
    """What keeps the weights of a frozen model so as they are read: the same as :func:`keep_base` makes of it whole.
    None for ``float32``."""
    if base == "float32":
        return None

    def keep(model: nn.Module) -> Put:
        inside, put_whole_one = set(_in_blocks(model)), put_whole(model)

        def put(name: str, value: Tensor) -> None:
            above, _, last = name.rpartition(".")
            layer: Any = model.get_submodule(above)
            if type(layer) is not nn.Linear or last != "weight":
                put_whole_one(name, value)
            elif base != "bfloat16" and layer in inside:
                _become_packed([layer], value.float(), base)
            else:
                layer.weight = nn.Parameter(value.float().to(torch.bfloat16), requires_grad=False)
                layer.__class__ = HalfLinear

        return put

    return keep


def restore_base(network: nn.Module) -> None:
    """The same weights in float32 again, as plain layers, in place."""
    layers: list[Any] = list(network.modules())
    for layer in layers:
        kind = type(layer)
        if issubclass(kind, HalfLinear):
            layer.weight.data = layer.weight.data.float()
            layer.__class__ = nn.Linear
        elif issubclass(kind, PackedLinear):
            layer.weight = nn.Parameter(layer.whole, requires_grad=False)
            del layer.scale, layer.packed
            layer.__class__ = nn.Linear


def take_packed(model: nn.Module, teacher: nn.Module) -> None:
    """Put the packed layers of a teacher in the place of those of a model that are to have its weights: one copy."""
    for name, layer in teacher.named_modules():
        if isinstance(layer, PackedLinear):
            model.set_submodule(name, deepcopy(layer, {id(weight): weight for weight in layer.parameters()}))


def _pack(base: str, networks: tuple[nn.Module, ...]) -> None:
    sharing: dict[int, list[Any]] = {}
    for network in networks:
        for layer in _in_blocks(network):
            if type(layer) is nn.Linear and not layer.weight.requires_grad:
                sharing.setdefault(id(layer.weight), []).append(layer)
    modules = [module for network in networks for module in network.modules()]
    if not sharing and not any(isinstance(module, PackedLinear) for module in modules):
        raise ValueError(
            f"student.lora.base: {base} packs the frozen linear layers of a network's blocks, and a "
            f"{type(networks[0]).__name__} has none: take float32 or bfloat16"
        )
    for layers in sharing.values():
        _become_packed(layers, layers[0].weight.detach(), base)


def _become_packed(layers: list[Any], weight: Tensor, base: str) -> None:
    values, scale = (nn.Parameter(part, requires_grad=False) for part in _packed(weight, base))
    for layer in layers:
        layer.weight, layer.scale, layer.packed = values, scale, (base, tuple(weight.shape))
        layer.__class__ = PackedLinear


def _in_blocks(module: nn.Module, is_inside: bool = False) -> Iterator[nn.Module]:
    """The modules in lists of a network, but for those of embeddings."""
    for part in module.children():
        if not type(part).__module__.endswith(".embeddings"):
            inside = is_inside or isinstance(module, nn.ModuleList | nn.Sequential)
            if inside:
                yield part
            yield from _in_blocks(part, inside)


def _packed(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """What is kept of a weight: the same numbers on every device, as the CPU rounds them. On the meta device their
    sizes."""
    numbers = weight.numel()
    if weight.is_meta:
        if kind == "int8":
            return torch.empty_like(weight, dtype=torch.int8), weight.new_empty(len(weight), dtype=torch.float32)
        blocks = -(-numbers // _BLOCK)
        return weight.new_empty((blocks * _BLOCK // 2, 1), dtype=torch.uint8), weight.new_empty(blocks).float()
    packing, whole = _packing(kind), weight.cpu().float().contiguous()
    if kind == "int8":
        values, scales, _ = packing.int8_vectorwise_quant(whole)
    else:
        # A block a row: bitsandbytes 0.50 makes others whole wrongly on the CPU, where rows are no multiple of a block.
        blocks = functional.pad(whole.flatten(), (0, -numbers % _BLOCK)).view(-1, _BLOCK)
        values, state = packing.quantize_4bit(blocks, blocksize=_BLOCK, quant_type="nf4")
        scales = state.absmax
    return values.to(weight.device), scales.to(weight.device)


def _unpacked(weight: Tensor, scale: Tensor, packed: Packed, dtype: torch.dtype) -> Tensor:
    kind, shape = packed
    if weight.is_meta:
        return weight.new_empty(shape, dtype=dtype)
    packing = _packing(kind)
    if kind == "int8":
        return packing.int8_vectorwise_dequant(weight, scale).to(dtype)
    made = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
    blocks = torch.Size((len(scale), _BLOCK))
    state = packing.QuantState(absmax=scale, shape=blocks, blocksize=_BLOCK, quant_type="nf4", dtype=made)
    return packing.dequantize_4bit(weight, state).flatten()[: prod(shape)].view(shape).to(dtype)


def _packing(base: str) -> Any:
    try:
        from bitsandbytes import functional as packing  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError(
            f"student.lora.base: {base} needs bitsandbytes, which is not installed: pip install 'fewstep[quantised]'"
        ) from None
    return packing
