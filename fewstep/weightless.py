"""Models from their configurations alone, on torch's ``meta`` device: shapes and types without numbers.

What a plan needs of a teacher and its data is known from the ``config.json`` of their folder. No weights are read, and
of a model on the hub none are fetched.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.counting import META
from fewstep.data import encoded, load_data, pairs
from fewstep.data.decode import check_side
from fewstep.diffusers_folder import look_into
from fewstep.drawing import classes_of, image_channels, shape_of
from fewstep.fields import DiffusionField, Guided, VelocityField, unguided
from fewstep.latents import Latents
from fewstep.loading import find_configurations
from fewstep.model_files import read_json
from fewstep.networks import FAMILIES
from fewstep.parts import EXACT, check_teacher, check_told, make_data, make_teacher, path_of, settled
from fewstep.prompts import SIZES
from fewstep.randomness import generator
from fewstep.recipe import Recipe, Teacher
from fewstep.trust import is_code

# Tokens that the pipelines with a T5 cut a prompt to (the default of ``encode_prompt``).
LONGEST = {
    "FluxPipeline": 512,
    "PixArtAlphaPipeline": 120,
    "PixArtSigmaPipeline": 300,
    "StableDiffusion3Pipeline": 256,
    "WanPipeline": 226,
}
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
        FileNotFoundError, ValueError: as ``fewstep.parts.make_teacher``.
    """
    if recipe.teacher is None:
        return None
    teacher, path = _teacher(recipe.teacher), path_of(recipe.student)
    check_teacher(recipe, teacher)
    return teacher if path is None or teacher.path.same_as(path) else teacher.on(path)


def _teacher(section: Teacher) -> VelocityField:
    guidance = section.guidance
    bare = section.model_copy(update={"guidance": None})
    is_folder = section.source not in EXACT and not is_code(section.source)
    folder = find_configurations(section.source) if is_folder else None
    field = make_teacher(bare).to(META) if folder is None else field_without_weights(folder)
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


def field_without_weights(folder: Path) -> DiffusionField:
    """The model of a diffusers folder as ``fewstep.load`` makes it, its network on the meta device.

    Raises:
        FileNotFoundError, ValueError: as ``fewstep.diffusers_folder.look_into``.
    """
    import diffusers

    found = look_into(folder)
    made: Any = getattr(diffusers, found.class_name)
    with META:
        model = made.from_config(made.load_config(found.model))
    field = DiffusionField(FAMILIES[found.class_name](model), found.scheduler)
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
    is_told = guidance is not None and (guidance.told or guidance.range is not None)
    if is_told or _config(model).get("guidance_embeds"):
        cond["guidance"] = _numbers(rows)
    return cond


def text_conditions(model: Any, rows: int) -> dict[str, Tensor]:
    """What the text encoders of a model give for prompts, (rows, ...) on the meta device; nothing for a model without
    text."""
    config, tokens = _config(model), _tokens(model)
    cond: dict[str, Tensor] = {}
    match _class(model):
        case "UNet2DConditionModel":
            width = config["encoder_hid_dim"] or config["cross_attention_dim"]
            cond["encoder_hidden_states"] = _numbers(rows, tokens, width if isinstance(width, int) else width[0])
            if config["addition_embed_type"] == "text_time":
                told = 6 * config["addition_time_embed_dim"]
                cond["text_embeds"] = _numbers(rows, config["projection_class_embeddings_input_dim"] - told)
                cond["time_ids"] = _numbers(rows, 6)
        case "PixArtTransformer2DModel":
            cond["encoder_hidden_states"] = _numbers(rows, tokens, config["caption_channels"])
            cond["encoder_attention_mask"] = torch.ones(rows, tokens, dtype=torch.long, device=META)
            if "resolution" in unguided(model).network.needed:
                cond |= {"resolution": _numbers(rows, 2), "aspect_ratio": _numbers(rows, 1)}
        case "SD3Transformer2DModel" | "FluxTransformer2DModel":
            cond["encoder_hidden_states"] = _numbers(rows, tokens, config["joint_attention_dim"])
            cond["pooled_projections"] = _numbers(rows, config["pooled_projection_dim"])
        case "WanTransformer3DModel":
            cond["encoder_hidden_states"] = _numbers(rows, tokens, config["text_dim"])
            if config["image_dim"] is not None:
                cond["encoder_hidden_states_image"] = _numbers(rows, 257, config["image_dim"])
    return cond


def _tokens(model: Any) -> int:
    """How many tokens a prompt is, by its pipeline's tokenizer and the length that ``encode_prompt`` cuts it to."""
    text = unguided(model).text
    if text is None:
        return _TOKENS.get(_class(model), 0)
    clip = read_json(text.folder / "tokenizer" / "tokenizer_config.json").get("model_max_length", 77)
    t5 = LONGEST.get(text.pipeline)
    return clip if t5 is None else t5 + clip * ("StableDiffusion3" in text.pipeline)


def _class(model: Any) -> str:
    """The class in diffusers that a model's network is of; nothing for another network."""
    inner = getattr(getattr(unguided(model), "network", None), "model", None)
    return type(inner).__name__.removeprefix("TwoTime")


def _config(model: Any) -> dict[str, Any]:
    inner = getattr(getattr(unguided(model), "network", None), "model", None)
    return dict(getattr(inner, "config", {}))


def _numbers(*shape: int) -> Tensor:
    return torch.empty(shape, device=META)
