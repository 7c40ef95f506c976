"""Prompts as the conditions of a text model, by its own text encoders and its pipeline's own ``encode_prompt``."""

import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fewstep.common.errors import refused, shown, unknown
from fewstep.common.model_files import ENCODER_WEIGHTS, class_of, load_weights, read_json, variant_in
from fewstep.latents.vae import sound_of
from fewstep.pipelines.stock_prompts import PROJECTION, RETURNED, encode_prompts


def knows_prompts(folder: Path) -> bool:
    """Whether a folder is a pipeline whose prompts fewstep can encode, with text encoders."""
    index = read_json(folder / "model_index.json")
    return class_of(index) in RETURNED and any(text_parts(index))


class Prompts:
    """The text encoders of a pipeline's folder, loaded when they are first needed; copies of a model share them.

    Args:
        folder: of a pipeline in ``RETURNED``: Stable Diffusion, Flux, Qwen-Image and others.
        dtype: of the encoders and of what they give.
        variant: of the encoders' weights, such as fp16, where they are there (see ``model_files.variant_in``).

    Raises:
        ValueError: a pipeline of another class.

    >>> field = fewstep.load("./stable-diffusion")
    >>> cond = field.text.encode(["a cat", "a dog"])
    >>> latents = fewstep.sample(field, torch.randn(2, 4, 64, 64), steps=50, **cond)
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype = torch.float32, variant: str | None = None) -> None:
        self.folder, self.dtype, self.variant = Path(folder).expanduser(), dtype, variant
        self.index = read_json(self.folder / "model_index.json")
        # An export of a flow map has a pipeline of its own, and says whose prompts these are.
        text = self.index.get("text")
        self.index |= text if isinstance(text, dict) else {}
        self._class = str(self.index.get("pipeline") or class_of(self.index))
        if self._class not in RETURNED:
            raise unknown("pipeline with text encoders", self._class, RETURNED)

    @property
    def pipeline(self) -> str:
        """The class of diffusers whose ``encode_prompt`` it calls."""
        return self._class

    def __deepcopy__(self, memo: dict[int, Any]) -> "Prompts":
        return self

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        *,
        size: tuple[int, int] | None = None,
        seconds: tuple[float, float] | None = None,
        device: torch.device | str = "cpu",
    ) -> dict[str, Tensor]:
        """The conditions of prompts, one row each: ``encoder_hidden_states`` (B, tokens, D) and what else the model
        takes.

        Args:
            size: height and width of the image in pixels, for models that are told (SDXL, PixArt-alpha at 1024); by
                default what the model was made for.
            seconds: where the sound begins and ends, for a model of sound; by default all that it makes at once.
            device: where the encoders run and the conditions are.

        Raises:
            ImportError: without the package transformers.
            FileNotFoundError: a text encoder or tokenizer that the folder's index names is not there.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts are a list of texts, such as ['a cat'], not {prompts!r}")
        if seconds is not None and (self._class != "StableAudioPipeline" or not 0 <= seconds[0] < seconds[1]):
            raise ValueError(f"seconds are {seconds!r}: for a model of sound, where it begins and, after that, ends")
        device = torch.device(device)
        return {**self._encode(list(prompts), device, seconds), **self._sizes(size, len(prompts), device)}

    def _encode(
        self, prompts: list[str] | None, device: torch.device, seconds: tuple[float, float] | None = None
    ) -> dict[str, Tensor]:
        for part in self._encoders.values():
            if isinstance(part, torch.nn.Module):
                torch.nn.Module.to(part, device, self.dtype)  # past the warnings of diffusers
        parts = {"transformer": _Transformer(self._model_config), **self._encoders}
        with refused(f"the text encoders in {self.folder} cannot encode prompts", "fetch them again"):
            return encode_prompts(self._class, parts, prompts, device, seconds or self._seconds)

    @torch.no_grad()
    def null(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The conditions of no prompt, one sample's, as the pipeline takes them for guidance where no negative prompt
        is given.

        >>> guided = fewstep.Guided(field, 7.5, null=field.text.null())
        """
        cond = {name: value[0] for name, value in self._encode(None, torch.device(device)).items()}
        if self._class == "StableDiffusionXLPipeline" and self.index.get("force_zeros_for_empty_prompt", True):
            cond |= {name: torch.zeros_like(cond[name]) for name in ("encoder_hidden_states", "text_embeds")}
        # The size of the image is no matter of guidance: it stays what each call says.
        return cond

    def _sizes(self, size: tuple[int, int] | None, rows: int, device: torch.device) -> dict[str, Tensor]:
        """What the model is told of the image: uncropped, of the size that is wanted."""
        config, factor = self._model_config, self._factor
        own = config.get("sample_size") or 128
        height, width = size or (factor * side for side in ((own, own) if isinstance(own, int) else own))
        if self._class == "StableDiffusionXLPipeline":
            told = {"time_ids": [height, width, 0, 0, height, width]}
        elif self._class.startswith("PixArt") and _is_told_sizes(config):
            told = {"resolution": [height, width], "aspect_ratio": [height / width]}
        else:
            told = {}
        return {
            name: torch.tensor([value], dtype=self.dtype, device=device).repeat(rows, 1) for name, value in told.items()
        }

    @property
    def _seconds(self) -> tuple[float, float] | None:
        """Where the sound of a model begins and ends, at its longest; None for one that makes none."""
        if self._class != "StableAudioPipeline":
            return None
        factor, rate = sound_of(read_json(self.folder / "vae" / "config.json"))
        return 0.0, self._model_config.get("sample_size", 1024) * factor / rate

    @cached_property
    def _model_config(self) -> dict[str, Any]:
        folders = (self.folder / name / "config.json" for name in ("unet", "transformer"))
        return next((read_json(file) for file in folders if file.is_file()), {})

    @property
    def _factor(self) -> int:
        """How many pixels one latent is, along each side."""
        levels = read_json(self.folder / "vae" / "config.json").get("block_out_channels")
        return 2 ** (len(levels) - 1) if levels else 8

    @cached_property
    def _encoders(self) -> dict[str, Any]:
        """The tokenizers and text encoders, by name."""
        if importlib.util.find_spec("transformers") is None:
            raise ImportError("prompts need the package transformers: pip install 'fewstep[text]'")
        for name in text_parts(self.index):
            if not (self.folder / name).is_dir():
                raise FileNotFoundError(
                    f"no {name} in {self.folder}, which its model_index.json names: fetch it, or pass the conditions "
                    "of the text yourself"
                )
        return load_encoders(self.folder, self.index, self.variant)


class _Transformer:
    """What SD3 asks for the width of what its third encoder would give, where it has none."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = SimpleNamespace(**config)


SIZES = ("time_ids", "resolution", "aspect_ratio")
# All that `encode` gives, of any pipeline.
TEXT_CONDITIONS = frozenset({*SIZES, *(name for names in RETURNED.values() for name in names if name)})


def _is_told_sizes(config: dict[str, Any]) -> bool:
    """Whether a PixArt is: those for 128 x 128 latents are, if their config does not say otherwise."""
    told = config.get("use_additional_conditions")
    return config.get("sample_size") == 128 if told is None else told


# The classes of transformers that the pipelines of ``RETURNED`` have, and no others: one may name any.
_ENCODERS = {
    *("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel", "UMT5EncoderModel"),
    *("Gemma2Model", "Mistral3ForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
    *("Qwen3ForCausalLM", "Qwen3Model", "ByT5Tokenizer", "PixtralProcessor"),
    *(f"{kind}Tokenizer{fast}" for kind in ("CLIP", "Gemma", "Llama", "Qwen2", "T5") for fast in ("", "Fast")),
}
# Keys of their configs by which transformers finds code in the folder, or kernels on the hub.
_NAMES_CODE = ("auto_map", "attn_implementation", "_attn_implementation")


def load_encoders(folder: Path, index: dict[str, Any], variant: str | None = None, **kwargs: Any) -> dict[str, Any]:
    """The tokenizers and text encoders of a pipeline's folder, by name.

    Args:
        variant: of the weights, where it is there.
        kwargs: of ``from_pretrained`` of the encoders.
    """
    import transformers

    parts = {}
    for name in text_parts(index):
        if name == PROJECTION:
            parts[name] = load_weights(projection_class(folder, index), folder / name, variant).eval()
            torch.nn.Module.to(parts[name], kwargs.get("dtype"))
            continue
        options: dict[str, Any] = {}
        if name.startswith("text_encoder"):
            found = variant_in(folder / name, ENCODER_WEIGHTS, variant)
            options = {"use_safetensors": True, "variant": found, **kwargs}
        kind = encoder_class(folder, index, name)
        with _no_bars(), refused(f"transformers cannot load the {kind} in {folder / name}", "fetch it again"):
            parts[name] = getattr(transformers, kind).from_pretrained(folder / name, **options)
    return parts


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' bars where there is no terminal: in a log they leave a line that does not end."""
    from transformers.utils import logging

    hides = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if hides:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hides:
            logging.enable_progress_bar()


def encoder_class(folder: Path, index: dict[str, Any], name: str) -> str:
    """The class in transformers of a tokenizer or text encoder that a pipeline's index has.

    Raises:
        ValueError: one that no pipeline of ``RETURNED`` has, or a config that names code.
    """
    library, kind = index[name]
    if library != "transformers" or kind not in _ENCODERS:
        raise unknown(f"class of {name} in {folder / 'model_index.json'}", str(kind), _ENCODERS)
    kept = read_json(folder / name / "config.json").get("model_type", "")
    if not isinstance(kept, str) or len(kept) > 40:
        raise ValueError(f"{folder / name / 'config.json'}: model_type is {shown(kept)}, no name: fetch it again")
    for file in ("config.json", "tokenizer_config.json"):
        if named := [key for key in _NAMES_CODE if key in read_json(folder / name / file)]:
            raise ValueError(f"{folder / name / file} names code ({named[0]}), which is not run: remove that key")
    return kind


def projection_class(folder: Path, index: dict[str, Any]) -> Any:
    """The class in diffusers of the part that brings text and seconds to one width.

    Raises:
        ValueError: another class than Stable Audio's.
    """
    from diffusers.pipelines.stable_audio import StableAudioProjectionModel

    known = StableAudioProjectionModel.__name__
    if index[PROJECTION][1] != known:
        raise unknown(f"class of {PROJECTION} in {folder / 'model_index.json'}", str(index[PROJECTION][1]), [known])
    return StableAudioProjectionModel


def text_parts(index: dict[str, Any]) -> list[str]:
    """The names of the tokenizers and text encoders that a pipeline's index has, and of a projection behind them."""
    return [
        name
        for name, value in index.items()
        if re.fullmatch(rf"(text_encoder|tokenizer)(_\d)?|{PROJECTION}", name)
        and isinstance(value, list)
        and value[:1] not in ([], [None])
    ]
