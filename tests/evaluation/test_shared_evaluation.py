"""Several processes measure what one does, to the last bit, and keep little however many samples there are."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from toys.processes import environment, torchrun

from fewstep.common.distributed import World
from fewstep.common.sharing import in_turn, rounds
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run

# What is measured, once in each world: the process that tells of it is the main one.
SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from torch import nn
from fewstep.common.randomness import generator
from fewstep.data.arrays import ArrayData
from fewstep.evaluation.evaluate import evaluate
from fewstep.flows.exact import CheckerboardField, GaussianField
from fewstep.flows.fields import NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.networks import MLP

draw = generator(3)

class Features(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(48, 12, generator=draw))

    def forward(self, x):
        return (x.flatten(1) @ self.weight).tanh() + 50  # far from 0

    def classify(self, x):
        return -(x.flatten(1).mean(1, keepdim=True) - torch.arange(3) / 10).abs()

class Labelled(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x, *times, class_labels=None, place=None):
        told = class_labels if place is None else place
        return told.to(x)[:, None, None, None].expand_as(x) / 10 + (self.scale - 1) * x

labels = torch.randint(3, (500,), generator=draw)
pixels = labels[:, None, None, None] / 10 + 0.05 * torch.randn(500, 3, 4, 4, generator=draw)
classes, places = (ArrayData(pixels, {name: labels}) for name in ("class_labels", "place"))
points = MLP(2, width=8, depth=2, times=2)
with torch.no_grad():
    for weight in points.parameters():
        weight.copy_(0.3 * torch.randn(weight.shape, generator=draw))
renoised = FlowMap(points)
renoised.gamma = 1.0
student, teacher = FlowMap(Labelled(0.05)), NetworkField(Labelled(0.06))
images = {"teacher": teacher, "teacher_steps": (16,), "steps": (1, 2), "extractor": Features(), "batch": 30}
gaussian = GaussianField(torch.tensor([1.0, -0.5]), torch.tensor([[0.5, 0.2], [0.2, 0.3]]))
CASES = {
    "classes": lambda **own: evaluate(student, data=classes, training=ArrayData(pixels[:40]), count=250,
        **images, **own),
    "places": lambda **own: evaluate(student, data=places, count=100, metrics=["fd", "diversity"], **images, **own),
    "points": lambda **own: evaluate(FlowMap(points), teacher=gaussian, steps=(1, 2), teacher_steps=(3,), count=170,
        batch=25, metrics=["rmse", "energy", "sliced_w2", "histogram_kl", "nll"], **own),
    "renoised": lambda **own: evaluate(renoised, teacher=CheckerboardField(), steps=(2,), count=90,
        teacher_steps=(1,), batch=25, **own),
}
found = {name: case(shared=True) for name, case in CASES.items()}
rank = os.environ.get("RANK", "0")
text = json.dumps({name: json.loads(one.to_json()) for name, one in found.items()})
(Path(sys.argv[1]) / f"found-{rank}.json").write_text(text)
shown = {name: {key: len(value) for key, value in one.samples.items()} for name, one in found.items()}
(Path(sys.argv[1]) / f"shown-{rank}.json").write_text(json.dumps(shown))
"""


def start(words: list[str], size: int) -> list["subprocess.Popen[str]"]:
    """The processes of one run, as a launcher would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "FEWSTEP_PATIENCE": "180"}
    return [
        subprocess.Popen(
            [sys.executable, *words],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **place),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def ended(processes: list["subprocess.Popen[str]"]) -> list[tuple[int, str]]:
    said = [process.communicate(timeout=240)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("alone")
    (folder / "script.py").write_text(SCRIPT)
    subprocess.run([sys.executable, str(folder / "script.py"), str(folder)], env=environment(), check=True, timeout=240)
    return folder / "script.py", json.loads((folder / "found-0.json").read_text())


@pytest.mark.takes_seconds
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_number_is_that_of_one_process(alone: tuple[Path, dict[str, Any]], tmp_path: Path, size: int) -> None:
    script, expected = alone
    for code, said in ended(start([str(script), str(tmp_path)], size)):
        assert code == 0, said[-2000:]
    for rank in range(size):
        found = json.loads((tmp_path / f"found-{rank}.json").read_text())
        for name, case in expected.items():
            for one, other in zip(case["rows"], found[name]["rows"], strict=True):
                assert one == other, (name, rank)  # the distances too, to the last bit
            assert case == found[name], (name, rank)
    shown = [json.loads((tmp_path / f"shown-{rank}.json").read_text()) for rank in range(size)]
    assert shown[0]["classes"]["student 1"] == shown[0]["classes"]["data"] == 64
    assert shown[1]["classes"] == {}
    names = {name for case in expected.values() for row in case["rows"] for name, value in row.items() if value}
    assert names >= {"fd", "feature_w2", "kid", "precision", "recall", "accuracy", "diversity", "rmse", "nll"}
    assert expected["classes"]["facts"]["training"] == 40
    assert expected["classes"]["rows"][0]["memorisation"] is not None


def test_items_are_made_in_turn_and_come_in_order() -> None:
    made: list[int] = []
    assert list(in_turn(range(5), lambda item: made.append(item) or item, World())) == [0, 1, 2, 3, 4]
    assert [rounds(n, World(0, 4)) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


RUN: dict[str, Any] = {
    "name": "points",
    "teacher": "eight-gaussians",
    "student": {"network": "mlp", "options": {"width": 16, "depth": 2}},
    "data": "eight-gaussians",
    "objective": "ITVM",
    "training": {"steps": 6, "batch": 32, "quiet": True},
    "evaluation": {"steps": [1, 2], "teacher_steps": [16], "count": 0, "batch": 50},
}


@pytest.mark.takes_seconds
def test_the_command_writes_the_report_of_one_process(tmp_path: Path) -> None:
    run(load_recipe(RUN), tmp_path / "run")
    words = ["evaluate", str(tmp_path / "run"), "--count", "230", "--device", "cpu"]
    ((code, said),) = ended(start(["-m", "fewstep", *words], 1))
    assert code == 0, said
    alone = (tmp_path / "run/quality.json").read_bytes()
    (tmp_path / "run/quality.json").unlink()
    done = torchrun("-m", "fewstep", *words, timeout=240, cwd=tmp_path)
    assert (tmp_path / "run/quality.json").read_bytes() == alone
    assert done.stdout.count("report.html have it too") == 1


COUNTED = """
import os, sys
from fewstep.evaluation import evaluate
from fewstep.cli import main

made, drawn = [], evaluate.sample

def sample(*args, **options):
    made.append(1)
    return drawn(*args, **options)

evaluate.sample = sample
code = main(sys.argv[1:])
print("batches", os.environ["RANK"], len(made), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.takes_seconds
@pytest.mark.parametrize("shard", [pytest.param(None, marks=pytest.mark.slow), "fsdp2"])
def test_the_end_of_a_training_is_measured_by_all_its_processes(tmp_path: Path, shard: str | None) -> None:
    (tmp_path / "counted.py").write_text(COUNTED)
    evaluation = {**RUN["evaluation"], "count": 230}  # five batches
    training = {**RUN["training"], "chunk": 16, "shard": shard}
    (tmp_path / "recipe.json").write_text(json.dumps({**RUN, "training": training, "evaluation": evaluation}))
    words = ["distill", str(tmp_path / "recipe.json"), "--out", str(tmp_path / "run"), "--training.device", "cpu"]
    done = ended(start([str(tmp_path / "counted.py"), *words], 2))
    assert [code for code, _ in done] == [0, 0], done
    found = (tmp_path / "run/quality.json").read_bytes()
    batches = [int(re.findall(r"batches \d (\d+)", said)[0]) for _, said in done]
    assert batches[0] > batches[1] >= 2 * len(evaluation["steps"])  # of the student alone 3 and 2 batches, twice
    ((code, said),) = ended(start(["-m", "fewstep", "evaluate", str(tmp_path / "run"), "--device", "cpu"], 1))
    assert code == 0, said
    assert (tmp_path / "run/quality.json").read_bytes() == found
    assert (tmp_path / "run/report.html").is_file()


# What happens to process 1 after some batches.
ENDS = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "wrong": "raise ValueError('the third batch is wrong')",
}
FAILING = """
import os, signal, sys
from fewstep.evaluation import evaluate
from fewstep.cli import main

made, drawn = [], evaluate.sample

def sample(*args, **options):
    made.append(1)
    if os.environ["RANK"] == "1" and len(made) == 3:
        {what}
    return drawn(*args, **options)

evaluate.sample = sample
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.takes_seconds
@pytest.mark.parametrize("how", ENDS)
def test_one_that_fails_ends_all_with_a_line_each(tmp_path: Path, how: str) -> None:
    run(load_recipe(RUN), tmp_path / "run")
    (tmp_path / "failing.py").write_text(FAILING.format(what=ENDS[how]))
    words = [str(tmp_path / "failing.py"), "evaluate", str(tmp_path / "run"), "--count", "500", "--device", "cpu"]
    (main, said), (other, last) = ended(start(words, 2))
    assert (main, other) == (1, -9 if how == "killed" else 2)
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, said
    assert "process 0 of 2: another process of this run has ended" in lines[0]
    assert "Traceback" not in said + last
    if how == "wrong":
        assert last.strip().splitlines() == ["error: the third batch is wrong"]
    assert not (tmp_path / "run/quality.json").exists()


GROWTH = """
import resource, sys
import torch
from torch import nn
from fewstep.data.batch import Batch
from fewstep.evaluation.evaluate import evaluate
from fewstep.flows.fields import NetworkField

class Images:  # of which none is kept anywhere
    shape, size = (1, 16, 16), None
    def rows(self, index, generator):
        return Batch(torch.randn(len(index), 1, 16, 16, generator=generator))

class Network(nn.Module):
    def forward(self, x, t):
        return -x

class Wide(nn.Module):
    def forward(self, x):
        return x.flatten(1).repeat(1, 4)[:, :1000]

def peak(count):
    how = {"steps": (1,), "extractor": Wide(), "metrics": sys.argv[1:], "batch": 500}
    evaluate(NetworkField(Network()), data=Images(), count=count, **how)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB

first = peak(4000)
print(peak(20000) - first)
"""


@pytest.mark.takes_seconds
def test_memory_is_flat_in_the_number_of_samples(tmp_path: Path) -> None:
    """The features of 16,000 samples more are 64 MB, and they would be held several times; some noise is kept."""
    (tmp_path / "growth.py").write_text(GROWTH)
    words = [sys.executable, str(tmp_path / "growth.py"), "fd"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 60
