"""Models of diffusers that are flow maps by themselves (AnyFlow, HunyuanImage as it was distilled), which their own
pipelines run."""

import inspect
from pathlib import Path
from typing import Any

from fewstep.common.model_files import class_of, read_json
from fewstep.flows.maps import FlowMap
from fewstep.models.diffusers_configs import find_scheduler
from fewstep.models.writing import pipeline_of
from fewstep.networks import AnyFlow


def is_own_map(model: Any) -> bool:
    """Whether a model is a flow map whose pipeline diffusers has."""
    return isinstance(model, FlowMap) and getattr(model.network, "has_second_time", False)


def strength_in(folder: Path) -> float | None:
    """The strength of guidance that the pipeline of a folder tells its model, if nothing is said."""
    import diffusers

    kind = getattr(diffusers, class_of(read_json(folder / "model_index.json")), None)
    if kind is None:
        return None
    told = inspect.signature(kind.__call__).parameters.get("distilled_guidance_scale")
    return None if told is None else told.default


def scheduler_of_map(model: FlowMap) -> Any:
    """The scheduler that such a model's pipeline came with; where that is gone, one without a shift."""
    import diffusers

    folder, _ = pipeline_of(model)
    if folder is not None and (folder / "scheduler").is_dir():
        return find_scheduler(folder)
    if isinstance(model.network, AnyFlow):
        return diffusers.FlowMapEulerDiscreteScheduler()
    return diffusers.FlowMatchEulerDiscreteScheduler()
