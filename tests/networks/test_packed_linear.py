"""A packed linear layer against the layer of the same rounded weights: values, both modes of derivatives, kinds."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import jvp

from fewstep.networks.frozen_base import PackedLinear, keep_base, restore_base

bitsandbytes = pytest.importorskip("bitsandbytes")
F64 = torch.float64
KINDS = ("int8", "nf4")


def packed(base: str, bias: bool = True, shape: tuple[int, int] = (48, 40)) -> tuple[Any, Any]:
    """A packed layer, and the plain one of the weight that it stands for, in float64."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(*shape, bias=bias)).requires_grad_(False)
    keep_base(base, network)
    plain = deepcopy(network)
    restore_base(plain)
    assert type(network[0]) is PackedLinear
    assert type(plain[0]) is nn.Linear
    return network[0], plain[0].to(F64)


@pytest.mark.parametrize("base", KINDS)
@pytest.mark.parametrize("shape", [(48, 40), (64, 64), (32, 5), (7, 33), (200, 3)])
def test_the_weight_is_rounded_by_the_rule(base: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    whole = nn.Linear(*shape).weight.detach()
    layer, _ = packed(base, shape=shape)
    off = (layer.whole - whole).abs()
    if base == "int8":  # to the nearest of 127 steps of a row's largest
        step = whole.abs().amax(1, keepdim=True) / 127
        assert (off <= 0.5001 * step).all()
        assert layer.weight.shape == whole.shape
    else:  # to the nearest of 16 codes times a block's largest
        codes = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
        blocks = nn.functional.pad(whole.flatten(), (0, -whole.numel() % 64)).view(-1, 64)
        largest = blocks.abs().amax(1, keepdim=True)
        nearest = (blocks[..., None] / largest[..., None] - codes).abs().amin(-1) * largest
        torch.testing.assert_close(off.flatten(), nearest.flatten()[: whole.numel()], atol=1e-6, rtol=0)
        assert layer.weight.nbytes == blocks.numel() // 2


@pytest.mark.parametrize("base", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_layer_of_its_weight_in_every_derivative(base: str, bias: bool) -> None:
    layer, plain = packed(base, bias)
    x, v, before = torch.randn(5, 7, 48, dtype=F64), torch.randn(5, 7, 48, dtype=F64), torch.randn(48, 48, dtype=F64)

    def all_of(linear: Any) -> list[torch.Tensor]:
        weight = before.clone().requires_grad_()
        call = lambda x: linear(torch.tanh(x @ weight)).sin()  # noqa: E731
        out, along = jvp(call, (x,), (v,))
        (over,) = torch.autograd.grad((out * along).sum(), weight)  # reverse over forward
        point = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(call(point).sum(), point, create_graph=True)
        (twice,) = torch.autograd.grad(grad.square().sum(), weight)  # reverse over reverse
        return [out, along, over, grad, twice]

    for mine, expected in zip(all_of(layer), all_of(plain), strict=True):
        assert mine.dtype == F64
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)  # its bias is kept in float32


def test_nothing_of_full_size_is_kept_for_the_backward_pass() -> None:
    layer, _ = packed("nf4")
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        layer(torch.randn(2, 48, requires_grad=True)).sum()
    assert kept
    assert max(x.nbytes for x in kept) < 4 * 48 * 40 / 6


@pytest.mark.parametrize("base", KINDS)
def test_under_autocast_it_computes_in_half(base: str) -> None:
    layer, plain = packed(base)
    x = torch.randn(3, 48, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(out.float().sum(), x)
    torch.testing.assert_close(out.double(), plain(x.double()), atol=0.03, rtol=0.03)
    torch.testing.assert_close(grad.double(), plain.weight.sum(0).expand(3, 48), atol=0.03, rtol=0.03)


def test_a_network_without_blocks_is_refused_in_one_line() -> None:
    bare = nn.Bilinear(3, 3, 2).requires_grad_(False)
    with pytest.raises(ValueError, match=r"base: nf4 packs .* a Bilinear has none: take float32 or bfloat16"):
        keep_base("nf4", bare)
