"""Models from their configurations alone, on torch's ``meta`` device: shapes and types without numbers.

What a plan needs of a teacher and its data is known from the ``config.json`` of their folder. No weights are read, and
of a model on the hub none are fetched.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.common.errors import shown
from fewstep.common.model_files import read_json
from fewstep.common.randomness import generator
from fewstep.common.trust import is_code
from fewstep.data import encoded, load_data, pairs
from fewstep.data.decode import check_side
from fewstep.flows.fields import DiffusionField, Guided, VelocityField, unguided
from fewstep.generation.drawing import classes_of, image_channels, shape_of
from fewstep.latents.prompts import SIZES, TEXT_CONDITIONS
from fewstep.latents.vae import Latents
from fewstep.models.diffusers_pipeline import look_into
from fewstep.models.loading import find_configurations
from fewstep.networks.unet import OfDiffusers
from fewstep.planning.counting import META
from fewstep.runs.build import EXACT, check_teacher, check_told, make_data, make_teacher, path_of, settled
from fewstep.runs.recipe import Recipe, Teacher

# Tokens that the pipelines with a T5 cut a prompt to (the default of ``encode_prompt``).
LONGEST = {
    "FluxPipeline": 512,
    "PixArtAlphaPipeline": 120,
    "PixArtSigmaPipeline": 300,
    "StableDiffusion3Pipeline": 256,
    "WanPipeline": 226,
}
_MOST_TOKENS = 1 << 16
# Tokens of a prompt, where no pipeline says how many its encoders make; of Stable Diffusion 3, of CLIP and T5 together.
_TOKENS = {
    "FluxTransformer2DModel": 512,
    "PixArtTransformer2DModel": 120,
    "SD3Transformer2DModel": 333,
    "UNet2DConditionModel": 77,
    "WanTransformer3DModel": 226,
}


def teacher_without_weights(recipe: Recipe) -> VelocityField | None:
    """The teacher of a recipe on the meta device, guided and on the path that the recipe says.

    A diffusers folder needs its ``.json`` files alone. Other teachers (runs, exports, functions of one's own) are
    loaded as they always are, and their numbers dropped.

    Raises:
        FileNotFoundError, ValueError: as ``fewstep.runs.build.make_teacher``.
    """
    if recipe.teacher is None:
        return None
    teacher, path = _teacher(recipe.teacher), path_of(recipe.student)
    check_teacher(recipe, teacher)
    return (teacher if path is None or teacher.path.same_as(path) else teacher.on(path)).to(META)


def _teacher(section: Teacher) -> VelocityField:
    guidance = section.guidance
    bare = section.model_copy(update={"guidance": None})
    is_folder = section.source not in EXACT and not is_code(section.source)
    folder = find_configurations(section.source) if is_folder else None
    field = make_teacher(bare) if folder is None else field_without_weights(folder)
    if guidance is None:
        return field
    if guidance.told:
        check_told(section.source, field)
        return field
    weak = None if guidance.weak is None else _teacher(Teacher(source=guidance.weak))
    null: Any = guidance.null
    if null == "text":
        text = text_conditions(field, 1)
        if not text:
            return make_teacher(section)  # which says what is wrong
        null = {name: value[0] for name, value in text.items() if name not in SIZES}
    return Guided(field, guidance.scale, guidance.interval, null=null, weak=weak)


def field_without_weights(folder: Path, variant: str | None = None) -> DiffusionField:
    """The model of a diffusers folder as ``fewstep.load`` makes it, its network on the meta device.

    Args:
        variant: of the weights of its VAE and text encoders.

    Raises:
        FileNotFoundError, ValueError: as ``fewstep.models.diffusers_pipeline.look_into``.
    """
    found = look_into(folder, variant)
    field = DiffusionField(found.network, found.scheduler)
    field.latents, field.text, field.distilled = found.latents, found.text, found.distilled
    return field.eval()


def sample_of(recipe: Recipe, teacher: VelocityField | None) -> tuple[tuple[int, ...], dict[str, Tensor] | None]:
    """The shape of a row of the recipe's data, and a few rows of its conditions on the meta device; None for those that
    its model is known to take. The data are opened only where they alone say what they are."""
    name, options = recipe.data.name, recipe.data.options
    inner = unguided(teacher)
    if inner is not None:
        if name == "teacher":
            return tuple(options.get("shape") or shape_of(inner)), None
        folder = Path(name).expanduser()
        if inner.latents is not None:
            for kind in (pairs, encoded):
                if (folder / kind.FACTS).is_file():
                    if options:
                        load_data(name, **options)  # which refuses them
                    return _written(inner.latents, name, kind.read_facts(folder)), None
        if inner.latents is not None or (not folder.exists() and "/" in name):
            return _sized(inner, options), None
    data = make_data(settled(recipe, teacher), teacher, None)
    cond = data.rows(torch.zeros(2, dtype=torch.long), generator(0)).cond
    return data.shape, {key: value.to(META) for key, value in cond.items()}


def _written(latents: Latents, name: str, facts: dict[str, Any]) -> tuple[int, ...]:
    """The shape of the latents in a folder that `encode` or `reflow` wrote."""
    shape = tuple(facts["shape"])
    if shape[0] != latents.channels:
        raise ValueError(
            f"the data {name!r} has latents of shape {shape}, and the teacher's have {latents.channels} channels: "
            "it was written for another model"
        )
    return shape


def _sized(field: VelocityField, options: dict[str, Any]) -> tuple[int, ...]:
    """The shape of a model's samples, of pictures of the size that the data are cut to."""
    shape, size = shape_of(field), options.get("size")
    if size is None or len(shape) != 3:
        return shape
    check_side(size)
    if field.latents is None:
        return (shape[0], size, size)
    return field.latents.shape_of((field.latents.image_channels, size, size))


def conditions(recipe: Recipe, model: Any, rows: int, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The conditions (rows, ...) that a model of diffusers takes in the training of a recipe, on the meta device."""
    cond = text_conditions(model, rows)
    if classes_of(model):
        cond["class_labels"] = torch.zeros(rows, dtype=torch.long, device=META)
    if channels := (recipe.student.image or image_channels(model)):
        cond["image"] = _numbers(rows, channels, *shape[1:])
    guidance = recipe.teacher.guidance if recipe.teacher else None
    if guidance is not None and (guidance.told or guidance.range is not None):
        cond["guidance"] = _numbers(rows)
    others = {name: _numbers(rows, *shape) for name, shape in _told(model).items() if name not in cond}
    return cond | others


def text_conditions(model: Any, rows: int) -> dict[str, Tensor]:
    """What the text encoders of a model give for prompts, (rows, ...) on the meta device; nothing for a model without
    text."""
    cond = {name: _numbers(rows, *shape) for name, shape in _told(model).items() if name in TEXT_CONDITIONS}
    if _class(model) == "PixArtTransformer2DModel":
        cond["encoder_attention_mask"] = torch.ones(rows, _tokens(model), dtype=torch.long, device=META)
    return cond


def _told(model: Any) -> dict[str, tuple[int, ...]]:
    """A row of each condition that a model of diffusers needs; nothing of another one."""
    network = getattr(unguided(model), "network", None)
    return network.told(_tokens(model)) if isinstance(network, OfDiffusers) else {}


def _tokens(model: Any) -> int:
    """How many tokens a prompt is, by its pipeline's tokenizer and the length that ``encode_prompt`` cuts it to."""
    text = unguided(model).text
    if text is None:
        return _TOKENS.get(_class(model), 0)
    file = text.folder / "tokenizer" / "tokenizer_config.json"
    clip = read_json(file).get("model_max_length", 77)
    if type(clip) is not int or not 0 < clip <= _MOST_TOKENS:
        raise ValueError(f"{file} has model_max_length {shown(clip)}, and a number of tokens is needed: fetch it again")
    t5 = LONGEST.get(text.pipeline)
    return clip if t5 is None else t5 + clip * ("StableDiffusion3" in text.pipeline)


def _class(model: Any) -> str:
    """The class in diffusers that a model's network is of; nothing for another network."""
    inner = getattr(getattr(unguided(model), "network", None), "model", None)
    return type(inner).__name__.removeprefix("TwoTime")


def _numbers(*shape: int) -> Tensor:
    return torch.empty(shape, device=META)
