"""What a command imports before it has work for it: torch takes a second, diffusers and torch.compile two more."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers", "ot", "sklearn", "torch._dynamo", "matplotlib")
CODE = f"""
import sys
from fewstep.cli import main
code = main(sys.argv[1:])
print("then", code, *(name for name in {HEAVY} if name in sys.modules))
"""


def imports(*words: object) -> tuple[int, set[str]]:
    """The exit code of a command, and the heavy modules that it imported."""
    done = subprocess.run([sys.executable, "-c", CODE, *map(str, words)], capture_output=True, text=True, check=True)
    code, *heavy = done.stdout.split("then ")[-1].split()
    return int(code), set(heavy)


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "no-such-recipe"),
        ("plan", "sdxl-itvm", "--gpu", "H10000"),
        ("plan", "sdxl-itvm", "--utilization", "2"),
        ("plan", "sdxl-itvm", "--training.batch", "100", "--training.chunk", "64"),
        ("plan", "sdxl-itvm", "--training.lr", "fast"),
        ("distill", "sdxl-itvm", "--training.batch", "-3"),
        ("distill", "sdxl-itvm", "--student.network", "foo"),
    ],
)
def test_what_is_refused_by_its_recipe_imports_nothing(words: tuple[str, ...]):
    assert imports(*words) == (2, set())


@pytest.mark.takes_seconds
def test_what_is_refused_by_its_parts_imports_torch_alone(tmp_path):
    assert imports("plan", "sdxl-itvm", "--objective", "ITVX") == (2, {"torch"})
    assert imports("distill", "--teacher", tmp_path / "nowhere", "--data", tmp_path) == (2, {"torch"})


@pytest.mark.takes_seconds
def test_a_run_of_points_imports_what_it_uses(tmp_path):
    words = ("--steps", "2", "--evaluation.count", "100", "--training.quiet", "true", "--out", tmp_path / "run")
    assert imports("distill", "checkerboard-itvm", *words) == (0, {"torch", "matplotlib"})
