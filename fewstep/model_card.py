"""The model card of an export: what it is, how it is used, and what it was made by."""

import inspect
import re
from typing import Any

import fewstep
from fewstep.drawing import classes_of, image_channels
from fewstep.maps import FlowMap
from fewstep.networks import MLP, TwoTimeUNet, UNet
from fewstep.objectives import OBJECTIVES

_CARD = """\
---
library_name: {library}
tags: [fewstep, {tag}]
---
# {name}

{what}

```python
{code}
```
{note}{method}{quality}
Made with fewstep {version}.
"""

_PIPELINE_CODE = """\
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
generator = torch.Generator().manual_seed(0)
{given}images = pipe(batch_size=4, num_inference_steps=2, generator=generator{cond}).images"""

_FEWSTEP_CODE = """\
import torch
import fewstep

model = fewstep.load("{name}")
{given}samples = fewstep.sample(model, torch.randn({shape}), steps={steps}{cond}){decode}"""

_DECODE = """
images = model.latents.decode(samples)"""

_IMAGE = """\
image = torch.zeros({shape})  # what each sample is made for, in the units of the training data
"""

_TEXT = """\
text = model.text.encode(["a photo of a cat"] * 4)
"""


def card(model: Any, name: str, method: str | None, quality: str | None, no_pipeline: str = "") -> str:
    """The README.md of an export of this name.

    Args:
        method: the objective it was trained by. quality: a Markdown table.
        no_pipeline: why no pipeline of diffusers runs it, for a field of which that is so.
    """
    is_map, is_unet = isinstance(model, FlowMap), isinstance(model.network, UNet | TwoTimeUNet)
    if is_map:
        what = "A two-time flow map: it makes samples in 1 to 8 network calls, as many as you ask for."
    else:
        what = "A velocity field: an ordinary differential equation from noise (t = 0) to data (t = 1)."
    if no_pipeline:
        vae = ", and `vae/` its VAE" if model.latents is not None else ""
        no_pipeline = (
            f"\nNo pipeline of diffusers samples it: {no_pipeline}. `unet/` and `scheduler/` are of diffusers' own "
            f"classes all the same{vae}.\n"
        )
    return _CARD.format(
        library="diffusers" if is_unet else "fewstep",
        tag="flow-map" if is_map else "flow-matching",
        name=name,
        what=what,
        code=_pipeline_code(model, name) if is_map and is_unet else fewstep_code(model, name),
        note=no_pipeline,
        method=f"\n## Method\n\n{_credit(method)}\n" if method else "",
        quality=f"\n## Quality against network calls\n\n{quality.strip()}\n" if quality else "",
        version=fewstep.__version__,
    )


def fewstep_code(model: Any, name: str) -> str:
    """How samples are drawn with fewstep, from a model of diffusers or an ``MLP`` in a folder of this name."""
    given, cond = "", ", class_labels=torch.tensor([0, 0, 0, 0])" if classes_of(model) else ""
    if image_channels(model):
        given, cond = given + _image(model), f"{cond}, image=image"
    if model.text is not None:
        given, cond = given + _TEXT, f"{cond}, **text"
    return _FEWSTEP_CODE.format(
        name=name,
        given=given,
        shape=_shape(model),
        steps=2 if isinstance(model, FlowMap) else 50,
        cond=cond,
        decode=_DECODE if model.latents is not None else "",
    )


def _pipeline_code(model: Any, name: str) -> str:
    given, cond = "", ", class_labels=0" if classes_of(model) else ""
    if image_channels(model):
        given, cond = _image(model), f"{cond}, image=image"
    return _PIPELINE_CODE.format(name=name, given=given, cond=cond)


def _image(model: Any) -> str:
    return _IMAGE.format(shape=_shape(model, image_channels(model)))


def _shape(model: Any, channels: int | None = None) -> str:
    """The shape of four samples, or of as many images with these channels."""
    config = model.network.config if isinstance(model.network, MLP) else model.network.model.config
    if isinstance(model.network, MLP):
        return f"4, {config['dim']}"
    size = config["sample_size"]
    height, width = ("HEIGHT", "WIDTH") if size is None else (size, size) if isinstance(size, int) else size
    return f"4, {config['in_channels'] - image_channels(model) if channels is None else channels}, {height}, {width}"


def _credit(method: str) -> str:
    """The method and the papers that the docstring of its class names."""
    papers = []
    if method in OBJECTIVES:
        papers = re.findall(r"\b\d{4}\.\d{4,5}\b", inspect.getdoc(OBJECTIVES[method]) or "")
    links = ", ".join(f"[arXiv {paper}](https://arxiv.org/abs/{paper})" for paper in dict.fromkeys(papers))
    return f"Trained with {method}{f' ({links})' if links else ''}."
