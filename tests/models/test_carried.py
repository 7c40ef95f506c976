"""The models that come with fewstep: a teacher, and its student for one call."""

from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep
from fewstep.flows.calls import count_calls

FOLDER = Path(fewstep.__file__).parent / "pretrained"


@pytest.fixture(scope="module")
def student() -> Any:
    return fewstep.load("fewstep:fashion-mnist-fast")


def test_each_is_small_and_says_what_it_is():
    assert {folder.name for folder in FOLDER.iterdir()} == {"fashion-mnist", "fashion-mnist-fast"}
    for folder in FOLDER.iterdir():
        assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 3e6
        assert "license: apache-2.0" in (folder / "README.md").read_text()
        assert not list(folder.rglob("*.py"))  # read, and never run


def test_the_student_is_a_map_of_the_same_images(student: Any):
    teacher = fewstep.load("fewstep:fashion-mnist")
    assert isinstance(student, fewstep.FlowMap)
    assert (len(student.class_names), student.class_names[-1]) == (10, "Ankle boot")
    assert student.path.same_as(teacher.path)


@pytest.mark.takes_seconds
def test_its_one_call_is_nearer_to_where_the_teacher_ends_than_two_of_the_teachers(student: Any):
    teacher, labels = fewstep.load("fewstep:fashion-mnist"), torch.arange(20) % 10
    noise = torch.randn(20, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    end = fewstep.sample(teacher, noise, 50, class_labels=labels)

    def error(model: Any, steps: int) -> float:
        with count_calls(model) as calls:
            x = fewstep.sample(model, noise, steps, class_labels=labels)
        assert calls.count == steps
        return float((x - end).square().mean().sqrt())

    assert error(student, 1) < 0.9 * error(teacher, 2)
    assert error(student, 2) < error(student, 1)
