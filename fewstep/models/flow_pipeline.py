"""The folder of a converted model: a pipeline of diffusers, whose network answers as a flow by the code it carries."""

import inspect
from pathlib import Path
from typing import Any

from fewstep.common.model_files import class_of, read_json
from fewstep.common.version import __version__
from fewstep.evaluation.agreement import scheduler_of
from fewstep.flows.fields import NetworkField
from fewstep.flows.signature import image_channels
from fewstep.latents.vae import VAE_FOLDERS, Latents
from fewstep.models.conversion import Conversion
from fewstep.models.converted import FLOWS, ORIGINAL
from fewstep.models.export import diffusion_of, no_pipeline
from fewstep.models.model_card import fewstep_code
from fewstep.models.stock_steps import drawn_as
from fewstep.models.wan_experts import boundary_said, models_of
from fewstep.models.writing import (
    copy_part,
    is_whole_part,
    parts_in,
    pipeline_of,
    save_part,
    variant_of,
    write_json,
    write_vae,
)
from fewstep.networks import UNet
from fewstep.pipelines.source import whole

# The pipeline of a model that comes without one.
_PIPELINES = {
    "UNet2DModel": "DDPMPipeline",
    "UNet2DConditionModel": "StableDiffusionPipeline",
    "DiTTransformer2DModel": "DiTPipeline",
    "PixArtTransformer2DModel": "PixArtAlphaPipeline",
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "FluxTransformer2DModel": "FluxPipeline",
    "Flux2Transformer2DModel": "Flux2Pipeline",
    "QwenImageTransformer2DModel": "QwenImagePipeline",
    "ZImageTransformer2DModel": "ZImagePipeline",
    "SanaTransformer2DModel": "SanaPipeline",
    "AuraFlowTransformer2DModel": "AuraFlowPipeline",
    "Lumina2Transformer2DModel": "Lumina2Pipeline",
    "ChromaTransformer2DModel": "ChromaPipeline",
    "HunyuanImageTransformer2DModel": "HunyuanImagePipeline",
    "AnyFlowTransformer3DModel": "AnyFlowPipeline",
    "WanExpertsTransformer3DModel": "WanPipeline",
    "WanTransformer3DModel": "WanPipeline",
    "LTXVideoTransformer3DModel": "LTXPipeline",
    "CogVideoXTransformer3DModel": "CogVideoXPipeline",
    "StableAudioDiTModel": "StableAudioPipeline",
    "UNet1DModel": "DanceDiffusionPipeline",
}
_CODE = "flow_model"


def place(field: NetworkField) -> dict[str, Any]:
    """What the folder of a field is in diffusers: the fields of a report that name its classes, what it lacks, and why
    its pipeline cannot be called."""
    import diffusers

    from fewstep.networks import flow_model

    name, (source, index) = _class_of(field), pipeline_of(field)
    usual = "LDMPipeline" if name == "UNet2DModel" and field.latents is not None else _PIPELINES[name]
    pipeline = class_of(index) if hasattr(diffusers, class_of(index)) else usual
    kind = getattr(diffusers, pipeline)
    wanted = inspect.signature(kind.__init__).parameters.values()
    absent = [part for part in parts_in(index) if source is not None and not is_whole_part(source / part)]
    left_out = [part for part in absent if part in kind._optional_components and not _is_of_text(part)]
    own = {
        "self",
        "unet",
        "transformer",
        "scheduler",
        *index,
        *([_vae_name(pipeline, field.latents)] if field.latents else []),
    }
    missing = [part.name for part in wanted if part.default is part.empty and part.name not in own]
    missing += [part for part in absent if part not in left_out]
    is_flow = field.is_flow
    # Only the pipeline of plain images does with a flow-match scheduler of diffusers as it is; see FlowScheduler.
    scheduler = scheduler_of(field)
    if not is_flow:
        scheduler = getattr(
            flow_model, "FlowMatchEulerDiscreteScheduler" if pipeline == "DDPMPipeline" else "FlowScheduler"
        )()
    by_hand = ""
    if pipeline in (usual, "StableDiffusionXLPipeline"):  # others may be made for an image beside the state
        if isinstance(field.network, UNet):
            by_hand = no_pipeline(field, scheduler)
        elif image_channels(field):
            by_hand = "none gives it the image that it takes beside the state"
    return {
        "written": name if is_flow else FLOWS[name],
        "pipeline": pipeline,
        "missing": tuple(missing),
        "left_out": tuple(left_out),
        "flow_scheduler": type(scheduler).__name__,
        "by_hand": by_hand,
    }


def write_folder(field: Any, conversion: Conversion, folder: Path) -> None:
    """The pipeline and its model card, into an empty folder."""
    import diffusers

    from fewstep.networks import flow_model

    source, index = pipeline_of(field)
    part = "unet" if "UNet" in conversion.model else "transformer"
    for name in parts_in(index):
        if source is not None and name not in (*conversion.missing, *conversion.left_out):
            copy_part(source / name, folder / name, source, variant=variant_of(field))
    index |= {name: [None, None] for name in conversion.left_out}
    if "safety_checker" in conversion.left_out:
        index["requires_safety_checker"] = False
    latents: Any = field.latents
    vae = "" if latents is None else _vae_name(conversion.pipeline, latents)
    if vae and not (folder / vae).exists():
        index[vae] = write_vae(latents, folder / vae)  # pyright: ignore[reportArgumentType]

    models = models_of(field.network.model)
    for name, one in models.items():
        save_part(one, folder / name)
    scheduler, libraries = scheduler_of(field), dict.fromkeys([*models, "scheduler"], "diffusers")
    if not field.is_flow:
        save_part(scheduler, folder / ORIGINAL)
        scheduler = getattr(flow_model, conversion.flow_scheduler)()
        file = folder / part / "config.json"
        config = {"_class_name": conversion.written, "diffusion": diffusion_of(field), "flow_timesteps": 1000}
        write_json(file, {**read_json(file), **config})
        libraries[part] = _CODE
        if conversion.flow_scheduler == "FlowScheduler":
            libraries["scheduler"] = _CODE
    save_part(scheduler, folder / "scheduler")
    for name in (name for name, library in libraries.items() if library == _CODE):
        (folder / name / f"{_CODE}.py").write_text(whole(flow_model.__file__))
    classes = {name: type(one).__name__ for name, one in models.items()}
    if not field.is_flow:
        classes[part] = conversion.written
    classes["scheduler"] = conversion.flow_scheduler
    index |= boundary_said(field.network.model, scheduler)
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


def _is_of_text(part: str) -> bool:
    return part.startswith(("text_encoder", "tokenizer"))


def _vae_name(pipeline: str, latents: Latents) -> str:
    """The part of a pipeline that its VAE is."""
    if latents.folder is not None and latents.folder.name in VAE_FOLDERS:
        return latents.folder.name
    return "vqvae" if pipeline.startswith("LDM") else "vae"


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
    "DanceDiffusionPipeline": "audios = pipe(batch_size=4, num_inference_steps=50).audios",
    "DDPMPipeline": "images = pipe(batch_size=4, num_inference_steps=50).images",
    "DiTPipeline": "images = pipe(class_labels=[0, 1], num_inference_steps=50).images",
    "LDMPipeline": "images = pipe(batch_size=4, num_inference_steps=50).images",
}

# What no pipeline of diffusers does with a UNet2DModel.
_LOOP = """\
pipe.scheduler.set_timesteps(50)
x = torch.randn({shape}){given}
with torch.no_grad():
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.step(pipe.unet({x}, t{told}).sample, t, x).prev_sample"""


def _code(conversion: Conversion, field: Any) -> str:
    """How to draw from the folder."""
    name = conversion.folder.name
    trust = "" if field.is_flow else ", trust_remote_code=True"
    trust += "".join(f", {part}=..." for part in conversion.missing)
    load = _LOAD.format(name=name, trust=trust)
    if not conversion.by_hand:
        usual = '{named} = pipe("{prompt}", num_inference_steps=50).{drawn}'.format(**drawn_as(field))
        return load + _CALLS.get(conversion.pipeline, usual)
    if conversion.model != "UNet2DModel" or field.latents is not None:
        return fewstep_code(field, name)
    channels, *sizes = field.network.shape
    shape, image = (", ".join(map(str, (4, c, *sizes))) for c in (channels, image_channels(field)))
    given, told, x = "", "", "x"
    if field.network.classes:
        given, told = "\nlabels = torch.tensor([0, 0, 0, 0])", ", class_labels=labels"
    if image_channels(field):
        given += f"\nimage = torch.zeros({image})  # what each sample is made for"
        x = "torch.cat([x, image], dim=1)"
    return load + _LOOP.format(shape=shape, given=given, told=told, x=x)


def _card(conversion: Conversion, field: Any) -> str:
    return _CARD.format(
        name=conversion.folder.name,
        model=conversion.model,
        code=_code(conversion, field),
        report=conversion.text(),
        version=__version__,
    )
