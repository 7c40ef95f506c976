"""The model card of an export: what it is, how it is used, and what it was made by."""

import inspect
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from fewstep.common.version import __version__
from fewstep.flows.description import NETWORKS
from fewstep.flows.maps import FlowMap
from fewstep.flows.signature import classes_of, image_channels, rate_of, shape_of
from fewstep.models.stock_steps import a_prompt
from fewstep.networks import OfDiffusers
from fewstep.objectives import OBJECTIVES

_CARD = """\
---
{front}---
# {name}

{what}

```python
{code}
```
{note}{method}{quality}{citation}
Made with fewstep {version}.
"""

_PIPELINE_CODE = """\
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
generator = torch.Generator().manual_seed(0)
{given}{drawn} = pipe({count}, num_inference_steps=2, generator=generator{cond}).{drawn}"""

_FEWSTEP_CODE = """\
import torch
import fewstep

model = fewstep.load("{name}"{trust})
{given}samples = fewstep.sample(model, {start}, steps={steps}{cond}){decode}"""

_DECODE = """
{drawn} = model.latents.decode(samples)"""

_SIZE = """\
height, width = 64, 64  # {what}
"""

_SOURCE = """\
start = torch.zeros({shape})  # rows of the data set that it goes from, in the place of noise
"""

_IMAGE = """\
image = torch.zeros({shape})  # what each sample is made for, in the units of the training data
"""

_CONDITIONS = """\
conditions = {{}}  # {names}: tensors with one row an image
"""

_TEXT = """\
text = model.text.encode(["{prompt}"] * 4)
"""


@dataclass(frozen=True)
class Origin:
    """What an export is made from, as far as it is known.

    Attributes:
        method: the objective it was trained by.
        quality: a Markdown table of quality against network calls.
        images: the files of images in the export, each with what it shows.
        recipe: the file of the recipe in the export.
        citation: BibTeX.
        base: what the front matter of the card takes from the model that it began as: ``license``, ``base_model``.
    """

    method: str | None = None
    quality: str | None = None
    pictures: dict[str, str] = field(default_factory=dict)
    recipe: str | None = None
    citation: str | None = None
    base: dict[str, str] = field(default_factory=dict)


def card(model: Any, name: str, origin: Origin = Origin(), no_pipeline: str = "", code: str = "") -> str:
    """The README.md of an export of this name.

    Args:
        no_pipeline: why no pipeline of diffusers runs it, for a field of which that is so.
        code: how it is used; by default by the pipeline that a flow map carries, or by fewstep.
    """
    is_map, is_of_diffusers = isinstance(model, FlowMap), isinstance(model.network, OfDiffusers)
    if is_map:
        what = "A two-time flow map: it makes samples in 1 to 8 network calls, as many as you ask for."
    else:
        what = "A velocity field: an ordinary differential equation from noise (t = 0) to data (t = 1)."
    if no_pipeline:
        vae = ", and `vae/` its VAE" if model.latents is not None else ""
        part = "unet" if "UNet" in type(model.network.model).__name__ else "transformer"
        no_pipeline = (
            f"\nNo pipeline of diffusers samples it: {no_pipeline}. `{part}/` and `scheduler/` are of diffusers' own "
            f"classes all the same{vae}.\n"
        )
    front = {
        "library_name": "diffusers" if is_of_diffusers else "fewstep",
        **({"pipeline_tag": f"text-to-{_kind(model)}"} if model.text is not None else {}),
        "tags": ["fewstep", "flow-map" if is_map else "flow-matching"],
        **origin.base,
    }
    return _CARD.format(
        front=yaml.safe_dump(front, sort_keys=False, default_flow_style=None, allow_unicode=True, width=1000),
        name=name,
        what=what,
        code=code or (_pipeline_code(model, name) if is_map and is_of_diffusers else fewstep_code(model, name)),
        note=no_pipeline + _units(model) + _coupled(model),
        method=_method(origin),
        quality=_quality(origin),
        citation=f"\n## Citation\n\n```bibtex\n{origin.citation.strip()}\n```\n" if origin.citation else "",
        version=__version__,
    )


def _units(model: Any) -> str:
    if model.moments is None:
        return ""
    mean, std = model.moments
    has_pipeline = isinstance(model, FlowMap) and isinstance(model.network, OfDiffusers)
    which = ' (output_type="latent")' if has_pipeline else ""
    return (
        f"\nThe data were brought to mean 0 and standard deviation 1. In their units samples{which} are `samples * "
        f"{std!r} + {mean!r}`: `fewstep sample` gives them, and the code above does not.\n"
    )


def _coupled(model: Any) -> str:
    if not getattr(model, "coupling", ""):
        return ""
    return (
        f"\nNoise and data were not independent in training (coupling: {model.coupling}), so the velocity tells no "
        "score: sample its ODE, not an SDE.\n"
    )


def _kind(model: Any) -> str:
    return "image" if rate_of(model) is None else "audio"


def _method(origin: Origin) -> str:
    lines = [_credit(origin.method)] if origin.method else []
    lines += [f"All that decided the training is in [{origin.recipe}]({origin.recipe})."] if origin.recipe else []
    return f"\n## Method\n\n{' '.join(lines)}\n" if lines else ""


def _quality(origin: Origin) -> str:
    pictures = "".join(f"\n{caption}:\n\n![{caption}]({file})\n" for file, caption in origin.pictures.items())
    table = f"\n{origin.quality.strip()}\n" if origin.quality else ""
    return f"\n## Quality against network calls\n{table}{pictures}" if table or pictures else ""


def fewstep_code(model: Any, name: str) -> str:
    """How samples are drawn with fewstep, from a model of diffusers or an ``MLP`` in a folder of this name."""
    given, cond = "", ", class_labels=torch.tensor([0, 0, 0, 0])" if classes_of(model) else ""
    if _has_any_size(model) and isinstance(model.network, OfDiffusers):
        given = _SIZE.format(what="of the samples: this model has no fixed size")
    if image_channels(model):
        given, cond = given + _image(model), f"{cond}, image=image"
    if model.text is not None:
        given, cond = given + _TEXT.format(prompt=a_prompt(model)), f"{cond}, **text"
    is_own = not isinstance(getattr(model, "network", None), (OfDiffusers, *NETWORKS.values()))  # its code comes along
    return _FEWSTEP_CODE.format(
        name=name,
        trust=", trust=True" if is_own else "",
        given=given + (_SOURCE.format(shape=_shape(model)) if model.path.two_sided else ""),
        start="start" if model.path.two_sided else f"torch.randn({_shape(model)})",
        steps=2 if isinstance(model, FlowMap) else 50,
        cond=cond,
        decode=_DECODE.format(drawn=_drawn(model)) if model.latents is not None else "",
    )


def _pipeline_code(model: Any, name: str) -> str:
    given, cond = "", ", class_labels=0" if classes_of(model) else ""
    count, factor = "batch_size=4", 1 if model.latents is None else model.latents.factor
    if _has_any_size(model):
        given = _SIZE.format(what="of the images, in pixels: this model has no fixed size")
        cond = f"{cond}, height=height, width=width"
    if image_channels(model):
        given, cond = given + _image(model, factor), f"{cond}, image=image"
    if model.text is not None:
        count = f'["{a_prompt(model)}"] * 4'
    elif others := [need for need in model.network.needed if need not in ("class_labels", "guidance")]:
        given, cond = given + _CONDITIONS.format(names=", ".join(others)), f"{cond}, **conditions"
    if model.network.takes_guidance:
        cond = f"{cond}, guidance_scale={model.guidance or 1.0:g}"
    return _PIPELINE_CODE.format(name=name, given=given, count=count, cond=cond, drawn=_drawn(model))


def _drawn(model: Any) -> str:
    return "images" if rate_of(model) is None else "audios"


def _image(model: Any, factor: int = 1) -> str:
    return _IMAGE.format(shape=_shape(model, image_channels(model), factor))


def _has_any_size(model: Any) -> bool:
    """Whether it is a network of diffusers that draws at any size; one of one's own may just not say."""
    network = getattr(model, "network", None)
    return isinstance(network, OfDiffusers) and not network.has_size


def _shape(model: Any, channels: int | None = None, factor: int = 1) -> str:
    """The shape of four samples, or of as many images with these channels.

    Args:
        factor: what the height and width above are to be divided by, for a model without a size of its own.
    """
    if _has_any_size(model) and isinstance(model.network, OfDiffusers):
        by = "" if factor == 1 else f" // {factor}"
        own, sizes = model.network.channels, [f"height{by}", f"width{by}"]
    else:
        try:
            own, *sizes = shape_of(model)
        except ValueError:  # a network of one's own that does not say
            return "4, ..."
    return ", ".join(map(str, [4, own if channels is None else channels, *sizes]))


def _credit(method: str) -> str:
    """The method, such as ``ITVM`` or ``Corrected around ITVM``, and the papers that the docstrings of its classes
    name."""
    known = [OBJECTIVES[name] for name in method.split(" around ") if name in OBJECTIVES]
    papers = [paper for one in known for paper in re.findall(r"\b\d{4}\.\d{4,5}\b", inspect.getdoc(one) or "")]
    links = ", ".join(f"[arXiv {paper}](https://arxiv.org/abs/{paper})" for paper in dict.fromkeys(papers))
    return f"Trained with {method}{f' ({links})' if links else ''}."
