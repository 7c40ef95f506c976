"""An objective in a loop of one's own: the very weights that ``fit`` ends with, for the same draws."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fewstep
from fewstep.networks import MLP

STEPS, BATCH, CHUNK, SEED, RATE = 6, 128, 64, 3, 1e-3
TEACHER = fewstep.CheckerboardField()
OBJECTIVES: dict[str, Callable[[], Any]] = {
    "ITVM": lambda: fewstep.ITVM(TEACHER),
    "LMD": lambda: fewstep.LMD(TEACHER),
    "MeanFlow": lambda: fewstep.MeanFlow(),
    "PFMM": lambda: fewstep.PFMM(TEACHER, rounds=3),  # has a state of its own
    "ConsistencyTraining": lambda: fewstep.ConsistencyTraining(stages=3),  # follows progress
}


def _student() -> fewstep.FlowMap:
    torch.manual_seed(0)
    return fewstep.FlowMap.from_field(TEACHER, network=MLP(2, width=32, depth=2, times=2)).train()


class Loop:
    """What the guide's page writes out, one update at a time."""

    def __init__(self, objective: Any, accumulate: int = 1) -> None:
        self.student, self.objective, self.accumulate = _student(), objective, accumulate
        objective.adopt(self.student)
        self.target = fewstep.Ema(self.student, objective.ema) if objective.ema is not None else None
        self.average = fewstep.Ema(self.student, 0.999, warmup=True)
        (self.parameters,) = objective.parameter_groups(self.student).values()
        self.optimizer = torch.optim.AdamW(self.parameters, weight_decay=0.0, fused=True)
        data = fewstep.load_data("checkerboard")
        self.batches = fewstep.Batches(data, BATCH, CHUNK, SEED, accumulate)
        self.losses: list[float] = []

    def update(self, step: int) -> None:
        for index in range(self.accumulate):
            rows, generators = self.batches.micro(step, index)
            loss = self.objective(
                self.student,
                rows,
                target=self.target and self.target.module,
                progress=step / STEPS,
                step=step,
                generator=generators,
            )
            (loss.total / self.accumulate).backward()
            self.losses.append(loss.total.item())
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        self.optimizer.step()
        self.optimizer.zero_grad()
        for copy in (self.target, self.average):
            if copy is not None:
                copy.update(step)

    def saved(self) -> dict[str, Any]:
        return {
            "student": self.student.state_dict(),
            "target": self.target and self.target.module.state_dict(),
            "average": self.average.module.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        self.student.load_state_dict(saved["student"])
        if self.target is not None:
            self.target.module.load_state_dict(saved["target"])
        self.average.module.load_state_dict(saved["average"])
        self.objective.load_state_dict(saved["objective"])
        self.optimizer.load_state_dict(saved["optimizer"])


def _same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def _fit(objective: Any, accumulate: int = 1) -> tuple[fewstep.FlowMap, nn.Module, list[float]]:
    student, losses = _student(), []
    result = fewstep.fit(
        student,
        objective,
        fewstep.load_data("checkerboard"),
        steps=STEPS,
        batch=BATCH,
        chunk=CHUNK,
        accumulate=accumulate,
        lr=RATE,
        seed=SEED,
        quiet=True,
        device="cpu",
        log_every=1,
        callbacks=[lambda run: losses.append(run.losses["loss"])],
    )
    return student, result.ema, losses


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loop_of_the_page_ends_with_the_weights_of_fit(name: str) -> None:
    loop = Loop(OBJECTIVES[name]())
    for step in range(STEPS):
        loop.update(step)
    student, average, losses = _fit(OBJECTIVES[name]())
    assert loop.losses == losses
    assert _same(loop.student, student)
    assert _same(loop.average.module, average)
    assert not _same(student, _student())  # it trained


def test_with_gradient_accumulation_too() -> None:
    loop = Loop(OBJECTIVES["ITVM"](), accumulate=2)
    for step in range(STEPS):
        loop.update(step)
    assert _same(loop.student, _fit(OBJECTIVES["ITVM"](), accumulate=2)[0])


@pytest.mark.parametrize("name", ["ITVM", "PFMM"])
def test_a_loop_that_is_stopped_goes_on_from_what_the_page_saves(name: str, tmp_path: Path) -> None:
    whole, first, second = (Loop(OBJECTIVES[name]()) for _ in range(3))
    for step in range(STEPS):
        whole.update(step)
    for step in range(5):  # within a round of PFMM
        first.update(step)
    torch.save(first.saved(), tmp_path / "checkpoint.pt")
    second.restore(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    for step in range(5, STEPS):
        second.update(step)
    assert _same(second.student, whole.student)
    assert _same(second.average.module, whole.average.module)


def test_what_a_loop_trained_is_exported_and_loaded(tmp_path: Path) -> None:
    loop = Loop(OBJECTIVES["ConsistencyTraining"]())
    loop.update(0)
    fewstep.export(loop.average.module, tmp_path / "map")
    loaded = fewstep.load(tmp_path / "map")
    assert isinstance(loaded, fewstep.FlowMap)
    assert loaded.gamma == loop.student.gamma == 1.0  # of a consistency model, told by adopt
    assert _same(loaded, loop.average.module)


class _Training(nn.Module):
    def __init__(self, student: nn.Module, objective: Any) -> None:
        super().__init__()
        self.student, self.objective = student, objective

    def forward(self, rows: torch.Tensor, **now: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = self.objective(self.student, fewstep.Batch(rows), **now)
        return loss.total, loss.terms


def test_accelerate_changes_nothing_on_one_process() -> None:
    accelerate = pytest.importorskip("accelerate")
    points = TEACHER.data(2 * BATCH, torch.Generator().manual_seed(0))

    def train(prepared: bool) -> nn.Module:
        student, objective = _student(), OBJECTIVES["ITVM"]()
        objective.adopt(student)
        training: Any = _Training(student, objective)
        loader: Any = DataLoader(TensorDataset(points), batch_size=BATCH)
        optimizer: Any = torch.optim.AdamW(student.parameters(), lr=RATE)
        if prepared:
            accelerator = accelerate.Accelerator(cpu=True)
            training, optimizer, loader = accelerator.prepare(training, optimizer, loader)
        target, generator = fewstep.Ema(student, objective.ema), torch.Generator().manual_seed(0)
        for step, (rows,) in enumerate(loader):
            total, _ = training(rows, target=target.module, step=step, generator=generator)
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            target.update(step)
        return student

    assert _same(train(True), train(False))
    assert not _same(train(False), _student())
