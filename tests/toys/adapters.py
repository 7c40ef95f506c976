"""Models with adapters of a LoRA, and short trainings of them."""

from pathlib import Path
from typing import Any

import torch

from fewstep.flows.fields import NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.models.lora import add_lora
from fewstep.networks import MLP
from fewstep.objectives import FlowMatching
from fewstep.runs.loading import load
from fewstep.training.fit import fit
from toys.families import tiny_pipeline
from toys.unet import tiny_field


def base_of(name: str, folder: Path) -> Any:
    """A tiny pipeline's field, read from its folder, which is written where it is not there."""
    if not folder.exists():
        tiny_pipeline(name).save_pretrained(folder)
    field: Any = load(folder)
    if hasattr(field.network, "size"):
        field.network.size = 8
    return field


def points(seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    return NetworkField(MLP(2, **{"width": 16, "depth": 2, **options})).to(dtype)


def images(prediction="v_prediction", **options):
    return tiny_field(prediction, **options)


def call(model, seed=0):
    """The model on noise, at several times; a map at several pairs."""
    draw = torch.Generator().manual_seed(seed)
    is_points = isinstance(model.network, MLP)
    dtype = next(model.parameters()).dtype
    x = torch.randn(3, *((2,) if is_points else (1, 8, 8)), generator=draw, dtype=torch.float64).to(dtype)
    s, t = torch.tensor([0.1, 0.5, 0.9]).to(dtype), torch.tensor([0.4, 0.8, 1.0]).to(dtype)
    config = {} if is_points else model.network.model.config
    cond = {"class_labels": torch.tensor([0, 1, 4])} if config.get("num_class_embeds") else {}
    with torch.no_grad():
        return model.average_velocity(x, s, t, **cond) if isinstance(model, FlowMap) else model(x, s, **cond)


def trained(model, size=0.1):
    """A model whose adapter speaks, as after training."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += size * torch.randn(weight.shape, generator=draw, dtype=torch.float64).to(weight)
    return model


def adapted(model, **options):
    torch.manual_seed(3)
    add_lora(model, **{"rank": 2, **options})
    return model


def shifted(count=256, shift=2.0):
    draw = torch.Generator().manual_seed(5)
    return 0.5 * torch.randn(count, 2, generator=draw) + shift


def quick(student, objective=None, data=None, **options):
    options = {"steps": 3, "batch": 16, "quiet": True, "checkpoint_every": 2, "lr": 1e-2, **options}
    return fit(student, objective or FlowMatching(), shifted() if data is None else data, **options)
