"""How a step computes: in which precision, compiled or not, with which activations kept, on how many threads."""

from typing import Any

import torch
from torch import nn

from fewstep.common import distributed, threads
from fewstep.common.errors import unknown
from fewstep.training import folder
from fewstep.training.batches import Batches
from fewstep.training.run import Run
from fewstep.training.step import (
    Step,
    checkpoints_followed,
    rehearsal,
)

PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def threads_for(run: Run, model: Step, batches: Batches, half: torch.dtype | None) -> int:
    """How many the training takes: as the user says, as it had them before, or as it was measured on its own step."""
    if threads.is_settled() or run.progress >= 1.0:
        return torch.get_num_threads()
    known = run.threads or (None if run.out is None else folder.threads_of(run.out))
    if known is not None:
        return known
    model = rehearsal(model)

    def work() -> None:
        rows, noise = batches.micro(run.step, 0)
        with checkpoints_followed(model.objective):
            with torch.autocast("cpu", half, enabled=half is not None, cache_enabled=False):
                loss, _, _ = model(rows, noise, run.target, run.progress, run.step)
            loss.backward()
        model.zero_grad()

    with distributed.alone():  # each process measures as often as it needs
        return threads.fastest(work)


def half_precision(precision: str, device: torch.device) -> torch.dtype | None:
    """The autocast type, None for none."""
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if precision == "fp16" and device.type != "cuda":
        raise ValueError(f"precision='fp16' needs a CUDA GPU, this is {device}: use 'bf16' or 'float32'")
    return PRECISIONS[precision]


def use_checkpoints(student: nn.Module) -> None:
    """Turn gradient checkpointing on, where the network is a diffusers model that has it."""
    network: Any = getattr(student, "network", None)
    if not getattr(getattr(network, "model", None), "_supports_gradient_checkpointing", False):
        raise ValueError(
            f"gradient_checkpointing=True is for diffusers models, and the student's network is a "
            f"{type(network).__name__}: leave it out, or checkpoint in its forward (torch.utils.checkpoint)"
        )
    network.enable_gradient_checkpointing()


def compile_networks(*models: Any) -> None:
    """Compile the networks in place; the averages for evaluation, called now and then, stay as they are."""
    for model in models:
        if model is not None:
            model.network.compile()
