"""Every kind of objective calls networks in its own way: sharded, each has the numbers that it has on one process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toys.sharded import launch, train

# By name: the twin, its method, options, and how far the numbers may be apart.
FINISH: dict[str, Any] = {"base": "ITVM", "begin": 0.2, "rollout": [1, 2]}
FAKE, CRITIC = {"name": "Corrected", "every": 2, **FINISH}, {"name": "Adversarial", **FINISH}
SMALL = {"name": "conv", "width": 8}
RUNS: dict[str, tuple[str, Any, dict[str, Any], float]] = {
    "no derivative": ("flux", "PSD", {}, 1e-9),
    "checkpoints": ("qwenimage", "ITVM", {"gradient_checkpointing": True}, 1e-9),
    "adapter": ("flux", "ITVM", {"rank": 2}, 1e-9),
    "fake": ("sd3", FAKE, {}, 1e-9),
    "fake adapter": ("qwenimage", FAKE, {"rank": 2}, 1e-9),
    "critic": ("dit", {**CRITIC, "critic": SMALL}, {}, 1e-6),
    # In float32, and heads' biases, which no pair of rows sees, go where rounding takes them.
    "teacher as critic": ("dit", {**CRITIC, "critic": "teacher"}, {"float32": True}, 1e-4),
    "frozen copy": ("dit", "PFMM", {}, 1e-9),
    "derivative": ("sd3", "LSD", {}, 1e-9),
    "derivative of the student": ("dit", "MeanFlow", {}, 1e-9),
    "velocity head": ("dit", "ImprovedMeanFlow", {}, 1e-9),
    "U-Net": ("sd", "ITVM", {}, 1e-9),
    "offload": ("flux", "ITVM", {"offload": True}, 1e-9),
    # Blocks are sent in bf16: their norms and biases are rounded too, and a processor
    # without bf16 of its own (AVX2 alone) was seen 2.02% apart in the smallest of the losses.
    "half": ("flux", "ITVM", {"float32": True, "precision": "bf16"}, 0.04),
    "half of what trains": ("flux", "ITVM", {"float32": True, "precision": "bf16", "rank": 2}, 0.04),
}
SCRIPT = f"""
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from toys.sharded import train

folder = Path(sys.argv[1])
for name, (twin, method, options, _) in json.loads({json.dumps(json.dumps(RUNS))}).items():
    if options.pop("float32", False):
        options["dtype"] = torch.float32
    result = train(twin, method, shard="fsdp2", steps=4, **options)
    if dist.get_rank() == 0:
        (folder / f"{{name}}.json").write_text(json.dumps(result.losses))
"""


@pytest.mark.takes_seconds
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_shards_have_the_numbers_of_one_process(processes: int, tmp_path: Path) -> None:
    """In one test, so that the processes start once."""
    launch(SCRIPT, tmp_path, processes)
    for name, (twin, method, given, tolerance) in RUNS.items():
        options = {key: value for key, value in given.items() if key not in ("float32", "offload")}
        if "float32" in given:
            options["dtype"] = torch.float32
        expected = train(twin, method, steps=4, **options).losses
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found.keys() == expected.keys(), name
        for key, value in expected.items():
            if "float32" in given and key in ("loss/critic_real", "loss/critic_made"):
                continue
            assert found[key] == pytest.approx(value, rel=tolerance), (name, key)
