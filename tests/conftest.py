"""What many tests share: the Gaussian, whose velocity and flow map are known in closed form, and a place
where fewstep is not."""

import os
import signal
from collections.abc import Callable, Iterator

# Before torch is imported, and for the processes that tests start: one thread, as bits and times of tests hang on it.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import pytest
import torch
from torch import Tensor
from toys.elsewhere import elsewhere  # noqa: F401
from toys.gaussian import GaussianAverageVelocity

from fewstep.flows.exact import GaussianField
from fewstep.flows.maps import FlowMap
from fewstep.objectives import two_time

torch.set_num_threads(1)
# Ctrl-C is heard, by them too: what nohup or a shell's background starts is told to ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _state_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Which runs fewstep wrote is remembered where nothing of the user's is."""
    before = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
    yield
    os.environ.pop("XDG_STATE_HOME")
    if before is not None:
        os.environ["XDG_STATE_HOME"] = before


@pytest.fixture
def gaussian() -> GaussianField:
    """N(mean, cov) in the plane, correlated, float64, on the linear path."""
    mean = torch.tensor([0.7, -1.1], dtype=torch.float64)
    cov = torch.tensor([[0.5, 0.3], [0.3, 1.7]], dtype=torch.float64)
    return GaussianField(mean, cov)


@pytest.fixture
def gaussian_map(gaussian: GaussianField) -> FlowMap:
    """The exact flow map of ``gaussian``, as a FlowMap around a network that is the truth."""
    return FlowMap(GaussianAverageVelocity(gaussian))


@pytest.fixture
def points() -> Tensor:
    """64 points of the plane, float64."""
    return torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def fraction(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Fixes the draw of a time between s and t in the objectives of maps: ``fraction(0.3)``; until then it is 0.3."""

    def fix(value: float) -> None:
        monkeypatch.setattr(two_time, "uniform", lambda rows, _: torch.full((rows,), value, dtype=torch.float64))

    fix(0.3)
    return fix
