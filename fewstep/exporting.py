"""Models to disk, in a form that others load: diffusers reads an export of a U-Net without fewstep installed.

The module is not called ``export``, as importing it would then hide the function of that name in ``fewstep``.
"""

import dataclasses
import inspect
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fewstep
from fewstep.fields import DiffusionField, NetworkField, VelocityField
from fewstep.loading import NETWORKS, PREDICTION_TYPES, load
from fewstep.lora import DIFFUSERS_FILE, PEFT_CONFIG, has_lora, merge_lora, save_adapter
from fewstep.maps import FlowMap
from fewstep.networks import TwoTimeUNet, UNet
from fewstep.objectives import OBJECTIVES
from fewstep.paths import Linear, Reversed, Tabulated
from fewstep.paths import Path as Trajectory


def export(
    model: FlowMap | VelocityField | str | Path,
    folder: str | Path,
    *,
    overwrite: bool = False,
    method: str | None = None,
    quality: str | None = None,
    adapter: bool = False,
) -> Path:
    """Write a model as a folder, and return the folder.

    * A flow map of a ``UNet2DModel``: a diffusers pipeline that carries its own code,
      ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)``.
    * A velocity field of a ``UNet2DModel``: the stock model and scheduler.
    * One of an ``MLP``: weights and a configuration for :func:`fewstep.load`.

    :func:`fewstep.load` reads each of them. The folder appears whole or not at all.

    Args:
        model: the model, or the folder of a run or of anything else that ``fewstep.load`` takes.
        overwrite: whether an export that is there already is replaced.
        method: the objective it was trained by, for the model card; a run knows its own.
        quality: a Markdown table for the model card.
        adapter: write the adapter of a LoRA alone (``fewstep.lora.save_adapter``), not the model that it is added to.

    Raises:
        ValueError: a model that cannot be exported, or ``folder`` is something else than an export.
        FileExistsError: there is an export already, and overwrite is not set.

    >>> fewstep.export(student, "fast-pipeline", method="ITVM")
    """
    folder = Path(folder).expanduser().resolve()
    check_target(folder, overwrite)
    if adapter:
        from fewstep.runs import open_run

        model = open_run(model).model if isinstance(model, str | Path) else model
        with aside(folder) as part:
            save_adapter(model, part)  # pyright: ignore[reportArgumentType]
        return folder
    if isinstance(model, str | Path):
        method = method or _method_of(Path(model).expanduser())
        model = load(model)
    if has_lora(model):
        model = merge_lora(model)
    write = _writer(model)
    with aside(folder) as part:
        write(model, part)
        (part / "README.md").write_text(_card(model, folder, method, quality))
    return folder


def check_target(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that is something else than a model, or one that is there and may not be overwritten."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    marks = ("model_index.json", "config.json", PEFT_CONFIG, DIFFUSERS_FILE)
    if not any((folder / name).is_file() for name in marks):
        raise ValueError(f"{folder} is there and is no model: nothing in it is overwritten, export to another folder")
    if not overwrite:
        raise FileExistsError(f"{folder} is there already: export to another folder, or overwrite it (overwrite=True)")


def _writer(model: FlowMap | VelocityField) -> Any:
    """The function that writes such a model, once it is clear that it can be written."""
    if not isinstance(model, FlowMap | NetworkField):
        raise ValueError(f"a {type(model).__name__} has no network of its own to export: export the field inside it")
    name = type(model.network).__name__
    if name in NETWORKS:
        return _write_plain
    if not isinstance(model.network, TwoTimeUNet if isinstance(model, FlowMap) else UNet):
        raise ValueError(
            f"a {type(model).__name__} of a {name} cannot be exported, one of {', '.join(NETWORKS)} or of a diffusers "
            "UNet2DModel can: keep model.network.state_dict(), and the checkpoints of its run"
        )
    if not model.path.same_as(Linear()):
        raise ValueError(f"a U-Net is exported on the linear path, this one is on {model.path}")
    if isinstance(model, DiffusionField) or (isinstance(model.native, Reversed) and model.prediction == "flow"):
        return _write_map if isinstance(model, FlowMap) else _write_field
    if isinstance(model, FlowMap) and isinstance(model.native, Tabulated) and model.prediction in PREDICTION_TYPES:
        return _write_map
    raise ValueError(
        f"a U-Net that predicts {model.prediction} on {model.native} has no counterpart in diffusers: to be exported "
        "it is trained as NetworkField(network, Reversed(), 'flow'), or started from a diffusion model"
    )


def _write_map(model: FlowMap, folder: Path) -> None:
    """A pipeline that carries its code, and the code of its model where diffusers has none."""
    import diffusers

    from fewstep.networks import class_time_unet
    from fewstep.pipelines import flow_map

    unet, native = _unet(model), model.native
    save_part(unet, folder / "unet")
    shutil.copyfile(flow_map.__file__, folder / "pipeline.py")
    library = "diffusers"
    if type(unet).__module__ == class_time_unet.__name__:
        library = "class_time_unet"
        shutil.copyfile(class_time_unet.__file__, folder / "unet" / f"{library}.py")

    diffusion = None
    if isinstance(native, Tabulated):
        kind = PREDICTION_TYPES[model.prediction]
        diffusion = {"prediction_type": kind, "log_ratios": native.log_ratios}
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(num_train_timesteps=_timesteps(native))
    save_part(scheduler, folder / "scheduler")
    write_json(
        folder / "model_index.json",
        {
            "_class_name": ["pipeline", "FlowMapPipeline"],
            "_diffusers_version": diffusers.__version__,
            "unet": [library, type(unet).__name__],
            "scheduler": ["diffusers", type(scheduler).__name__],
            "diffusion": diffusion,
            "gamma": model.gamma,
        },
    )


def _write_field(model: NetworkField, folder: Path) -> None:
    """A stock model and scheduler; as a stock pipeline too, where the model has no classes to be told."""
    import diffusers

    unet = _unet(model)
    save_part(unet, folder / "unet")
    if isinstance(model, DiffusionField):
        scheduler = model.scheduler
    else:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=_timesteps(model.native))
    save_part(scheduler, folder / "scheduler")
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "DDPMPipeline",
            "_diffusers_version": diffusers.__version__,
            "unet": ["diffusers", type(unet).__name__],
            "scheduler": ["diffusers", type(scheduler).__name__],
        },
    )


def _write_plain(model: FlowMap | NetworkField, folder: Path) -> None:
    """Weights and a configuration, for fewstep alone."""
    from safetensors.torch import save_file

    network: Any = model.network
    state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(
        folder / "config.json",
        {
            "_class_name": "FlowMap" if isinstance(model, FlowMap) else "NetworkField",
            "_fewstep_version": fewstep.__version__,
            "network": {"name": type(network).__name__, "options": network.config},
            "native": _describe(model.native),
            "prediction": model.prediction,
            "path": _describe(model.path),
            **({"gamma": model.gamma} if isinstance(model, FlowMap) else {}),
        },
    )


def _unet(model: FlowMap | NetworkField) -> Any:
    network: Any = model.network
    return network.model


def save_part(part: Any, folder: Path) -> None:
    """A model or scheduler, without the path that it was loaded from: that is the business of its maker."""
    part.save_pretrained(folder)
    config = folder / part.config_name
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)
    write_json(config, values)


def _timesteps(native: Trajectory) -> int:
    """How many timesteps of diffusers there are from data to noise."""
    return round(native.scale) if isinstance(native, Reversed) else 1000


def _describe(path: Trajectory) -> dict[str, Any]:
    return {"name": type(path).__name__, "options": dataclasses.asdict(path)}


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


@contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """A new folder beside ``folder`` that takes its place at the end, and leaves nothing behind where it fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part, old = (folder.with_name(f".{folder.name}.{what}-{os.getpid()}") for what in ("part", "old"))
    part.mkdir()
    try:
        yield part
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _method_of(run: Path) -> str | None:
    """The objective in a run's recipe; None for a folder that is no run."""
    import yaml

    recipe = run / "recipe.yaml"
    return yaml.safe_load(recipe.read_text())["objective"]["name"] if recipe.is_file() else None


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
{method}{quality}
Made with fewstep {version}.
"""

_PIPELINE_CODE = """\
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
generator = torch.Generator().manual_seed(0)
images = pipe(batch_size=4, num_inference_steps=2, generator=generator{labels}).images"""

_FEWSTEP_CODE = """\
import torch
import fewstep

model = fewstep.load("{name}")
samples = fewstep.sample(model, torch.randn({shape}), steps={steps}{labels})"""


def _card(model: Any, folder: Path, method: str | None, quality: str | None) -> str:
    is_map = isinstance(model, FlowMap)
    if is_map:
        what = "A two-time flow map: it makes samples in 1 to 8 network calls, as many as you ask for."
    else:
        what = "A velocity field: an ordinary differential equation from noise (t = 0) to data (t = 1)."
    if is_image := isinstance(model.network, UNet | TwoTimeUNet):
        config = model.network.model.config
        size, classes = config["sample_size"], config["num_class_embeds"]
        shape = f"4, {config['in_channels']}, {size}, {size}"
    else:
        shape, classes = f"4, {model.network.config['dim']}", model.network.config["classes"]
    if is_map and is_image:
        code = _PIPELINE_CODE.format(name=folder.name, labels=", class_labels=0" if classes else "")
    else:
        labels = ", class_labels=torch.tensor([0, 0, 0, 0])" if classes else ""
        code = _FEWSTEP_CODE.format(name=folder.name, shape=shape, steps=2 if is_map else 50, labels=labels)
    return _CARD.format(
        library="diffusers" if is_image else "fewstep",
        tag="flow-map" if is_map else "flow-matching",
        name=folder.name,
        what=what,
        code=code,
        method=f"\n## Method\n\n{_credit(method)}\n" if method else "",
        quality=f"\n## Quality against network calls\n\n{quality.strip()}\n" if quality else "",
        version=fewstep.__version__,
    )


def _credit(method: str) -> str:
    """The method and the papers that the docstring of its class names."""
    papers = []
    if method in OBJECTIVES:
        papers = re.findall(r"\b\d{4}\.\d{4,5}\b", inspect.getdoc(OBJECTIVES[method]) or "")
    links = ", ".join(f"[arXiv {paper}](https://arxiv.org/abs/{paper})" for paper in dict.fromkeys(papers))
    return f"Trained with {method}{f' ({links})' if links else ''}."
