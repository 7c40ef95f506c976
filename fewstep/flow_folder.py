"""The folder of a converted model: a pipeline of diffusers, whose network answers as a flow by the code it carries."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import fewstep
from fewstep.agreement import scheduler_of
from fewstep.conversion import Conversion
from fewstep.converted import FLOWS, ORIGINAL
from fewstep.exporting import save_part, write_json
from fewstep.fields import NetworkField
from fewstep.loading import PREDICTION_TYPES
from fewstep.model_files import read_json
from fewstep.paths import Linear, Preconditioned, Tabulated

# The pipeline of a model that comes without one.
_PIPELINES = {
    "UNet2DModel": "DDPMPipeline",
    "UNet2DConditionModel": "StableDiffusionPipeline",
    "DiTTransformer2DModel": "DiTPipeline",
    "PixArtTransformer2DModel": "PixArtAlphaPipeline",
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "FluxTransformer2DModel": "FluxPipeline",
}
_CODE = "flow_model"


def place(field: NetworkField) -> dict[str, Any]:
    """What the folder of a field is in diffusers: the fields of a report that name its classes and what it lacks."""
    import diffusers

    name, index = _class_of(field), _source(field)[1]
    pipeline = str(index.get("_class_name") or _PIPELINES[name])
    wanted = inspect.signature(getattr(diffusers, pipeline).__init__).parameters.values()
    own = {"self", "unet", "transformer", "scheduler", *index, *(["vae"] if field.latents else [])}
    missing = [part.name for part in wanted if part.default is part.empty and part.name not in own]
    is_flow = isinstance(field.native, Linear)
    # Only the pipeline of plain images does with a flow-match scheduler of diffusers as it is; see FlowScheduler.
    scheduler = "FlowMatchEulerDiscreteScheduler" if pipeline == "DDPMPipeline" else "FlowScheduler"
    return {
        "written": name if is_flow else FLOWS[name],
        "pipeline": pipeline,
        "missing": tuple(missing),
        "flow_scheduler": type(scheduler_of(field)).__name__ if is_flow else scheduler,
    }


def write_folder(field: Any, conversion: Conversion, folder: Path) -> None:
    """The pipeline and its model card, into an empty folder."""
    import diffusers

    from fewstep.networks import flow_model

    source, index = _source(field)
    part = "unet" if "UNet" in conversion.model else "transformer"
    own = {part, "scheduler"}
    for name, value in index.items():
        if source is not None and isinstance(value, list) and value[0] and name not in own:
            shutil.copytree(source / name, folder / name)
    if field.latents is not None and "vae" not in index and "vqvae" not in index:
        save_part(field.latents.vae, folder / "vae")
        index["vae"] = ["diffusers", type(field.latents.vae).__name__]

    save_part(field.network.model, folder / part)
    scheduler, libraries = scheduler_of(field), {part: "diffusers", "scheduler": "diffusers"}
    if not isinstance(field.native, Linear):
        save_part(scheduler, folder / ORIGINAL)
        scheduler = getattr(flow_model, conversion.flow_scheduler)()
        file = folder / part / "config.json"
        config = {"_class_name": conversion.written, "diffusion": _diffusion(field), "flow_timesteps": 1000}
        write_json(file, {**json.loads(file.read_text()), **config})
        libraries[part] = _CODE
        if conversion.flow_scheduler == "FlowScheduler":
            libraries["scheduler"] = _CODE
    save_part(scheduler, folder / "scheduler")
    for name in (name for name, library in libraries.items() if library == _CODE):
        shutil.copyfile(flow_model.__file__, folder / name / f"{_CODE}.py")
    classes = {part: conversion.written, "scheduler": conversion.flow_scheduler}
    write_json(
        folder / "model_index.json",
        {
            "_class_name": conversion.pipeline,
            "_diffusers_version": diffusers.__version__,
            **{name: value for name, value in index.items() if not name.startswith("_")},
            **{name: [libraries[name], classes[name]] for name in classes},
        },
    )
    (folder / "README.md").write_text(_card(conversion, field))


def _class_of(field: Any) -> str:
    return type(field.network.model).__name__


def _source(field: Any) -> tuple[Path | None, dict[str, Any]]:
    """The folder of the pipeline that a field's VAE and text encoders are from, and its index; none for a field that
    has neither, or a VAE alone."""
    if field.text is not None:
        folder = field.text.folder
    elif field.latents is not None and field.latents.folder is not None:
        folder = field.latents.folder.parent
    else:
        return None, {}
    index = read_json(folder / "model_index.json")
    return folder, {name: value for name, value in index.items() if name not in ("_diffusers_version", "_name_or_path")}


def _diffusion(field: NetworkField) -> dict[str, Any]:
    """What the network was trained as, for the config of its flow; see ``flow_model.FromDiffusion``."""
    match field.native:
        case Tabulated(log_ratios=table):
            return {"prediction_type": PREDICTION_TYPES[field.prediction], "log_ratios": table}
        case Preconditioned(sigma_data=data, sigma_min=least, sigma_max=most):
            kind = "epsilon" if field.prediction == "edm" else "v_prediction"
            return {"prediction_type": kind, "sigma_data": data, "sigma_min": least, "sigma_max": most}
    raise ValueError(f"{field.native} is not known to the code that a converted model carries")


_CARD = """\
---
library_name: diffusers
tags: [fewstep, flow-matching]
---
# {name}

A {model} as a flow: an ordinary differential equation from noise to data, with the weights that it had (arXiv
2506.02221).

```python
{code}
```

{report}
Made with fewstep {version}.
"""

_LOAD = """\
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}"{trust})
"""

_CALLS = {
    "DDPMPipeline": "images = pipe(batch_size=4, num_inference_steps=50).images",
    "DiTPipeline": "images = pipe(class_labels=[0, 1], num_inference_steps=50).images",
    "LDMPipeline": "images = pipe(batch_size=4, num_inference_steps=50).images",
}

# No pipeline of diffusers tells a UNet2DModel its class.
_LOOP = """\
pipe.scheduler.set_timesteps(50)
x, labels = torch.randn({shape}), torch.tensor([0, 0, 0, 0])
with torch.no_grad():
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.step(pipe.unet(x, t, class_labels=labels).sample, t, x).prev_sample"""


def _card(conversion: Conversion, field: Any) -> str:
    if conversion.model == "UNet2DModel" and field.network.classes:
        call = _LOOP.format(shape=", ".join(map(str, (4, *field.network.shape))))
    else:
        call = _CALLS.get(conversion.pipeline, 'images = pipe("a photo of a cat", num_inference_steps=50).images')
    trust = "" if isinstance(field.native, Linear) else ", trust_remote_code=True"
    trust += "".join(f", {part}=..." for part in conversion.missing)
    name = conversion.folder.name
    return _CARD.format(
        name=name,
        model=conversion.model,
        code=_LOAD.format(name=name, trust=trust) + call,
        report=conversion.text(),
        version=fewstep.__version__,
    )
