"""Remembered kernels of the meta device give what the kernels give: shapes, types, storages, and whole counts."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from toys.families import conditions, tiny_model

from fewstep.data.batch import Batch
from fewstep.flows.fields import NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.models.weightless import META
from fewstep.networks.families import FAMILIES
from fewstep.objectives import ITVM
from fewstep.planning import counting, remembered
from fewstep.planning.counting import count_step
from fewstep.planning.remembered import Remembered


class Forgetful(Remembered):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "product": lambda x: x @ x,
    "transposed": lambda x: x.mT + x,
    "another type": lambda x: x.to(torch.bfloat16),
    "a number": lambda x: x * 2,
    "a float": lambda x: x * 2.0,
    "several": lambda x: torch.max(x, dim=0),
    "norm": lambda x: torch.native_layer_norm(x, (4,), None, None, 1e-5),
    "list": lambda x: torch.cat([x, x]),
    "arange": lambda x: torch.arange(4, device=META),
    "view": lambda x: x.unsqueeze(0),
    "unsafe view": lambda x: torch.ops.aten._unsafe_view(x.contiguous(), (8, 2)),
    "parts": lambda x: x.split(2),
    "in place": lambda x: x.clone().add_(1),
    "complex": lambda x: torch.complex(x, x).conj() * 2,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_made_again_is_what_the_kernel_makes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "_MADE", {})
    for x in (empty(4, 4), empty(4, 4, dtype=torch.float64), empty(4, 4).T, empty(4, 4)):
        expected = OPERATIONS[name](x)
        with Remembered():
            found = OPERATIONS[name](x)
        ours, theirs = ([one] if isinstance(one, Tensor) else list(one) for one in (found, expected))
        for a, b in zip(ours, theirs, strict=True):
            assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
            assert (a.untyped_storage()._cdata == x.untyped_storage()._cdata) == (
                b.untyped_storage()._cdata == x.untyped_storage()._cdata
            )
            assert a.untyped_storage().nbytes() == b.untyped_storage().nbytes()


def test_a_kernel_is_asked_once_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "_MADE", {})
    with Remembered():
        for rows in (3, 3, 5, 3, 5):
            torch.exp(empty(rows, 2))
    kinds = [key for key in remembered._MADE if isinstance(key, tuple) and key[0][1] is torch.ops.aten.exp.default]
    assert len(kinds) == 2


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_a_step_is_counted_alike(name: str, precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "_MADE", {})

    def count() -> Any:
        model = tiny_model(name)
        teacher = NetworkField(FAMILIES[type(model).__name__](model))
        student = FlowMap.from_field(teacher).to(META).train().requires_grad_(True)
        target = deepcopy(student).eval().requires_grad_(False)
        cond = {key: empty(4, *value.shape[1:]) for key, value in conditions(name).items()}
        batch = Batch(empty(4, 4, 8, 8), cond)
        return count_step(student, ITVM(teacher.to(META)), batch, target=target, precision=precision)

    first, again = count(), count()
    assert remembered._MADE
    monkeypatch.setattr(counting, "Remembered", Forgetful)
    assert first == again == count()
    assert first.flops > 0
