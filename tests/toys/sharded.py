"""Trainings of tiny twins on one process or several, sharded or not, that differ in nothing else.

In float64, unless said: what the order of sums does to AdamW's first steps is then far from all that could be wrong.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep
from fewstep import FlowMap, fit
from fewstep.data.batch import Batch
from fewstep.flows.fields import NetworkField
from fewstep.networks.families import FAMILIES
from fewstep.objectives.base import Objective
from fewstep.training.run import Result
from toys.families import conditions, tiny_model
from toys.processes import torchrun

TRAINING: dict[str, Any] = {"steps": 6, "batch": 16, "chunk": 4, "log_every": 1, "quiet": True, "device": "cpu"}


class Latents:
    """64 latents of 4 x 8 x 8, with the conditions of a twin."""

    size, shape = 64, (4, 8, 8)

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.data = torch.randn(self.size, *self.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        cond = {key: value[torch.arange(self.size) % 2] for key, value in conditions(name).items()}
        self.cond = {key: value.to(dtype) if value.is_floating_point() else value for key, value in cond.items()}

    def rows(self, index: Tensor, generator: torch.Generator) -> Batch:
        return Batch(self.data[index], {key: value[index] for key, value in self.cond.items()})


def field_of(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> NetworkField:
    model = tiny_model(name, **options)
    return NetworkField(FAMILIES[type(model).__name__](model)).to(dtype)


def objective_of(method: str | dict[str, Any], teacher: NetworkField) -> Objective:
    """``ITVM``, or ``{"name": "Corrected", "base": "ITVM", ...}`` with options."""
    options = dict(method) if isinstance(method, dict) else {"name": method}
    make, base = getattr(fewstep, options.pop("name")), options.pop("base", None)
    return make(teacher if base is None else objective_of(base, teacher), **options)


def train(
    name: str,
    method: str | dict[str, Any],
    out: Path | None = None,
    rank: int | None = None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Result[FlowMap]:
    """Distil a twin. With a LoRA of this ``rank``, the student shares the teacher's weights."""
    teacher = field_of(name, dtype)
    torch.manual_seed(7)
    student = FlowMap.from_field(teacher, share=rank is not None)
    if rank is not None:
        fewstep.add_lora(student, rank=rank)
    return fit(student, objective_of(method, teacher), Latents(name, dtype), out=out, **{**TRAINING, **options})


def launch(script: str, folder: Path, processes: int, *more: str) -> None:
    """Run a script by torchrun, its folder as the first argument."""
    file = folder / "train.py"
    file.write_text(script)
    torchrun(*more, file, folder, processes=processes)
