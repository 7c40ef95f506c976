"""The type of what draws by the command, and whether two arrays of samples agree."""

from collections.abc import Callable

import numpy as np

NAMES = {0: "tench, Tinca tinca", 1: "goldfish", 2: "great white shark", 3: "cock", 4: "hen"}


Draw = Callable[..., np.ndarray]


def close(one: np.ndarray, other: np.ndarray) -> None:
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
