"""A critic on two processes is one on one: second derivatives, the noise's controller, the adaptive weight."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toys.processes import torchrun

SCRIPT = """
import sys
from pathlib import Path
import torch
from torch.utils.data import TensorDataset
from fewstep import ITVM, Adversarial, FlowMap, fit
from fewstep.common.randomness import generator
from fewstep.flows.exact import eight_gaussians
from fewstep.networks import MLP

def train(name, **options):
    torch.manual_seed(0)
    student = FlowMap(MLP(2, width=16, depth=2, times=2))
    base = ITVM(eight_gaussians(), ema=0.9)
    critic = {"name": "mlp", "width": 16}
    objective = Adversarial(base, critic, begin=0.2, ramp=0.0, weight=0.5, **options)
    data = TensorDataset(eight_gaussians().data(500, generator(9)))
    fit(student, objective, data, 20, out=Path(sys.argv[1]) / name, batch=64, chunk=16, log_every=5, quiet=True,
        accumulate=2 if options.get("slopes") == "difference" else 1, device="cpu")

train("exact", adaptive=True, diffused={"images": 400, "interval": 2})
train("difference", slopes="difference", diffused={"images": 400, "interval": 2})
"""


def trained(folder: Path, processes: int) -> Path:
    folder.mkdir()
    (folder / "train.py").write_text(SCRIPT)
    torchrun(folder / "train.py", folder, processes=processes)
    return folder


@pytest.mark.takes_seconds
def test_two_processes_have_the_critic_of_one(tmp_path: Path):
    one, two = trained(tmp_path / "one", 1), trained(tmp_path / "two", 2)
    for name in ("exact", "difference"):
        (a, b) = (sorted((folder / name / "checkpoints").glob("*/*.safetensors")) for folder in (one, two))
        assert [file.name for file in a] == [file.name for file in b]
        seen: set[str] = set()
        for first, second in zip(a, b, strict=True):
            ours, theirs = load_file(first), load_file(second)
            assert ours.keys() == theirs.keys()
            for key in ours:
                seen.add(key)
                if key.endswith("head.linear.bias"):  # which no pair sees: rounding alone moves it
                    continue
                torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=2e-5, msg=f"{name} {key}")
                if key.endswith(("critic.p", "critic.signs", "critic.rows", "critic.changed")):
                    assert torch.equal(ours[key], theirs[key]), key
        assert any(key.endswith("critic.p") for key in seen)
