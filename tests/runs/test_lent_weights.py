"""What is about to be shared out begins on memory that is there: the student on the teacher's, averages on its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toys.families import tiny_pipeline

from fewstep import fit
from fewstep.flows.guided import unguided
from fewstep.runs.build import build
from fewstep.runs.recipes import load_recipe
from fewstep.runs.students import make_student
from fewstep.training.ema import Ema

TRAINING: dict[str, Any] = {"steps": 2, "batch": 8, "chunk": 4, "shard": "fsdp2", "quiet": True, "device": "cpu"}


@pytest.mark.takes_seconds
@pytest.mark.parametrize("second_time", ["t", "none"])
def test_a_student_takes_its_rows_of_the_teacher(tmp_path: Path, second_time: str) -> None:
    tiny_pipeline("dit").save_pretrained(tmp_path / "pipeline")
    recipe = load_recipe({
        "name": "lent", "teacher": str(tmp_path / "pipeline"), "student": {"second_time": second_time},
        "objective": "ITVM" if second_time == "t" else "ConsistencyDistillation", "training": TRAINING,
        "data": {"name": "teacher", "count": 8, "steps": 1}, "evaluation": {"count": 0},
    })  # fmt: skip
    built = build(recipe, tmp_path / "run")
    teacher: Any = unguided(built.teacher)
    theirs = {weight.data_ptr() for weight in teacher.parameters()}
    new = [weight for weight in built.student.parameters() if weight.data_ptr() not in theirs]
    assert sum(weight.numel() for weight in new) < 0.5 * sum(weight.numel() for weight in teacher.parameters())
    assert bool(new) == (second_time == "t")  # the second time alone
    assert all(weight.requires_grad for weight in built.student.parameters())
    assert {id(weight) for weight in built.student.parameters()}.isdisjoint(map(id, teacher.parameters()))
    own = make_student(recipe.student, tuple(built.data.shape), built.teacher, True, recipe.seed).train()
    assert {weight.data_ptr() for weight in own.parameters()}.isdisjoint(theirs)
    before = {name: weight.clone() for name, weight in teacher.named_parameters()}
    options = {**TRAINING, "seed": 3}
    lent = fit(built.student, built.objective, built.data, **options)
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.named_parameters())
    plain = fit(own, built.objective, built.data, **options)  # pyright: ignore[reportArgumentType]
    for ours, others in ((lent.student, plain.student), (lent.ema, plain.ema)):
        weights = dict(others.named_parameters())
        assert all(torch.equal(weight, weights[name]) for name, weight in ours.named_parameters())
    average = dict(lent.ema.named_parameters())
    assert not all(torch.equal(weight, average[name]) for name, weight in lent.student.named_parameters())


def test_an_average_that_is_not_shared_out_gets_memory_of_its_own() -> None:
    model = nn.Linear(3, 3)
    ema = Ema(model, 0.5, lent=True)
    assert ema.module.weight.data_ptr() == model.weight.data_ptr()
    ema.follow(model)
    assert ema.module.weight.data_ptr() != model.weight.data_ptr()
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update(0)
    torch.testing.assert_close(ema.module.weight, start + 0.5)
