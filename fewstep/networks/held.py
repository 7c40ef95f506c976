"""Where a diffusion model is asked: on its schedule, and where its prediction means something.

It is part of the code of exports and of converted models, so it needs nothing.
"""

import math
from typing import Any

# Where a prediction loses its meaning (noise at no signal, data at no noise) the ratio of the two is held at this:
# beyond, an error of the network would count more than a thousandfold.
HOLD = math.log(1000.0)


def held_ratios(diffusion: dict[str, Any]) -> tuple[float, float]:
    """The log(data / noise) between which a network is asked.

    Args:
        diffusion: what it speaks, as the folders say it; see ``flow_model.FromDiffusion``.
    """
    low, high = -math.inf, math.inf
    if "sigma_data" in diffusion:
        low, high = -math.log(diffusion["sigma_max"]), -math.log(diffusion["sigma_min"])
    elif "log_ratios" in diffusion:
        high, *_, low = diffusion["log_ratios"]
        low = -math.inf if diffusion.get("ends_in_noise") else low
    kind = diffusion["prediction_type"]
    if kind == "epsilon" and "sigma_data" not in diffusion:  # what EDM calls epsilon is -v
        low = max(low, -HOLD)
    return low, min(high, HOLD) if kind == "sample" else high
