"""What the parts of overhead.py share: a clock, ratios within rounds, the networks that they train."""

import statistics
import time
from collections.abc import Callable
from typing import Any

# What a part measured: by case and quantity, some of them in groups.
Found = dict[str, dict[str, Any]]


def cpu_time(function: Callable[[], Any], times: int = 1) -> float:
    start = time.process_time()
    for _ in range(times):
        function()
    return (time.process_time() - start) / times


def ratio(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> dict[str, float]:
    """The median of the ratios within rounds, in which now one and now the other is first."""
    ours()
    theirs()
    found = []
    for n in range(rounds):
        first, second = (ours, theirs) if n % 2 else (theirs, ours)
        a, b = first(), second()
        found.append((a, b) if n % 2 else (b, a))
    return {
        "ratio": statistics.median(a / b for a, b in found),
        "ours_ms": 1e3 * statistics.median(a for a, _ in found),
        "reference_ms": 1e3 * statistics.median(b for _, b in found),
    }


def network_of(kind: str) -> tuple[Any, Any, Any, int]:
    """A student, its teacher, its data and its batch."""
    import torch

    import fewstep
    from fewstep import networks
    from fewstep.data import load_data
    from fewstep.data.arrays import ArrayData

    torch.manual_seed(0)
    if kind == "mlp":
        exact = fewstep.CheckerboardField()
        network = networks.MLP(2, width=128, times=2)
        return fewstep.FlowMap.from_field(exact, network), exact, load_data("checkerboard"), 1024
    if kind == "unet":
        teacher: Any = fewstep.load("fewstep:fashion-mnist")
        shape, batch = (1, 28, 28), 64
    else:
        teacher, shape, batch = dit(), (4, 16, 16), 16
    data = ArrayData(torch.randn(256, *shape), {"class_labels": torch.arange(256) % 10})
    return fewstep.FlowMap.from_field(teacher), teacher, data, batch


def dit() -> Any:
    from diffusers import DiTTransformer2DModel

    from fewstep import networks
    from fewstep.flows.fields import NetworkField
    from fewstep.flows.paths import Linear, VariancePreserving

    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=48, in_channels=4, out_channels=4, num_layers=6, sample_size=16,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    return NetworkField(networks.DiT(model), VariancePreserving(), "noise", path=Linear())
