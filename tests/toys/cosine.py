"""Stable Audio's scheduler, without the package by which its sampler draws noise."""

import importlib
import sys
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

_MODULE = "diffusers.schedulers.scheduling_cosine_dpmsolver_multistep"


class Silent:
    """In the place of the noise of the sampler."""

    def __init__(self, x: Tensor, **_: Any) -> None:
        self.x = x

    def __call__(self, *_: Any) -> Tensor:
        return torch.zeros_like(self.x)


def cosine_scheduler(**options: Any) -> Any:
    """diffusers' own, which draws no noise on the way."""
    with patch.dict(sys.modules, {"torchsde": sys.modules.get("torchsde", ModuleType("torchsde"))}):
        module: Any = importlib.import_module(_MODULE)
    module.BrownianTreeNoiseSampler = Silent
    return module.CosineDPMSolverMultistepScheduler(**options)
