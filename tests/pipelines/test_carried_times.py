"""One rule in three places: how a network of another path is asked, in fewstep and in two files that folders carry.

``fewstep.flows.change_of_path.scaling`` is the one; ``flow_model.flow_scaling`` and ``native_times.coefficients`` are
written again, as they are carried alone. Over random schedules they are equal, at the ends and beyond them too.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fewstep.flows.change_of_path import scaling
from fewstep.flows.fields import NetworkField
from fewstep.flows.paths import Forward, Linear, Path, Reversed
from fewstep.flows.preconditioned import Cosine, Preconditioned
from fewstep.flows.tabulated import Tabulated
from fewstep.models.export import diffusion_of
from fewstep.models.folders import _spoken
from fewstep.models.manifests import Diffusion
from fewstep.networks.flow_model import flow_scaling
from fewstep.networks.held import held_ratios
from fewstep.pipelines.native_times import coefficients, second_timestep

F64 = torch.float64
# 1 - t and t are both exact.
TIMES = torch.cat([torch.arange(0, 129) / 128, 2.0 ** -torch.arange(8.0, 40.0), 1 - 2.0 ** -torch.arange(8.0, 40.0)])
TIMES = TIMES.double()

tables = st.builds(
    lambda top, falls, ends: Tabulated(tuple(top - sum(falls[:k]) for k in range(len(falls) + 1)), ends),
    st.floats(-3, 12),
    st.lists(st.floats(1e-3, 4.0), min_size=1, max_size=30),
    st.booleans(),
).filter(lambda table: table.log_ratios[-1] < 6)
scalings = st.builds(
    lambda data, least, more: Preconditioned(data, least, least * more),
    st.floats(0.1, 3.0), st.floats(1e-5, 1.0), st.floats(1.5, 1e6),
)  # fmt: skip
lines = st.builds(Reversed, st.sampled_from([1.0, 500.0, 1000.0]))
circles = st.builds(Cosine, st.sampled_from([1.0, 500.0]))
SPOKEN = [(tables, kind) for kind in ("noise", "data", "v")] + [(scalings, kind) for kind in ("edm", "v")]
SPOKEN += [(lines, kind) for kind in ("noise", "data")] + [(circles, kind) for kind in ("noise", "data", "v")]


@pytest.mark.takes_seconds
@pytest.mark.parametrize(("natives", "kind"), SPOKEN, ids=["table"] * 3 + ["EDM"] * 2 + ["line"] * 2 + ["circle"] * 3)
def test_the_three_are_one(natives: Any, kind: str) -> None:
    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(native=natives)
    def check(native: Path) -> None:
        diffusion, last = spoken(native, kind)
        expected = scaling(native, kind, Linear(), TIMES)
        wanted = torch.stack([expected.into, expected.time, expected.skip, expected.out], dim=1)
        assert wanted.isfinite().all()
        into, step, skip, out = flow_scaling(1 - TIMES, diffusion)
        close(torch.stack([into, step, -skip, -out], dim=1), wanted)
        close(torch.tensor([coefficients(diffusion, t, last) for t in TIMES], dtype=F64), wanted)
        told = [second_timestep(diffusion, t, last, alike=True) for t in TIMES]
        close(torch.tensor(told, dtype=F64), expected.time)
        told = [second_timestep(diffusion, t, last) for t in TIMES]
        close(torch.tensor(told, dtype=F64), native.network_time(TIMES))
        # The ends themselves: those of the path, and of the ratio that the files go by.
        ends = torch.tensor(native.hold_range(kind), dtype=F64)
        ratios = (native.alpha(ends).log() - native.sigma(ends).log()).tolist()
        for found, end in zip(held_ratios(diffusion), ratios, strict=True):
            assert found == pytest.approx(end, rel=1e-6, abs=1e-9) or (math.isinf(found) and abs(end) > 30)
        back, same = _spoken(Diffusion.model_validate(diffusion), last)
        assert (back, same) == (native, kind)

    check()


@pytest.mark.parametrize(("native", "kind"), [(Reversed(700.0), "flow"), (Forward(700.0), "velocity")])
def test_a_flow_of_the_straight_path_is_asked_as_it_is(native: Any, kind: str) -> None:
    diffusion = diffusion_of(NetworkField(nn.Identity(), native, kind, path=Linear())) or {}
    expected = scaling(native, kind, Linear(), TIMES)
    wanted = torch.stack([expected.into, expected.time, expected.skip, expected.out], dim=1)
    close(torch.tensor([coefficients(diffusion, t, native.scale) for t in TIMES], dtype=F64), wanted)
    told = [second_timestep(diffusion, t, native.scale) for t in TIMES]
    close(torch.tensor(told, dtype=F64), native.network_time(TIMES))


def spoken(native: Path, kind: str) -> tuple[dict[str, Any], float]:
    """What folders say of a network, and the timestep of pure noise."""
    diffusion = diffusion_of(NetworkField(nn.Identity(), native, kind, path=Linear()))
    assert diffusion is not None
    return diffusion, native.steps - 1 if isinstance(native, Tabulated) else getattr(native, "scale", 1000.0)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-7, rtol=1e-7)
