"""The VAE and text encoders of a model without its network: found, known by what they are, and the empty prompt that
they have encoded before."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fewstep.common.disk import replace_file
from fewstep.common.model_files import ENCODER_WEIGHTS, WEIGHTS, read_json, weight_paths
from fewstep.common.reading import no_file
from fewstep.common.user_folders import cache_folder
from fewstep.data.shards import read_shard
from fewstep.latents.prompts import Prompts, text_parts
from fewstep.latents.vae import Latents
from fewstep.pipelines.stock_prompts import PROJECTION

_TEXT_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
# Keys of a config.json that say where it is from and by what it was written, not what the model is.
_NOT_THE_MODEL = ("transformers_version", "torch_dtype", "dtype", "architectures", "name_or_path")


def vae_identity(latents: Latents) -> str:
    """A VAE by its class and a hash of its weights and its config."""
    digest = hashlib.sha256()
    if latents.folder is None:
        config, weights = dict(latents.vae.config), latents.vae.state_dict()
        for name, value in weights.items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        name = type(latents.vae).__name__
    else:
        config = read_json(latents.folder / "config.json")
        name = config.get("_class_name", "")
        for file in weight_paths(latents.folder, variant=latents.variant):
            digest.update(f"{file.name} {_digest(file)}".encode())
    digest.update(_plain(config).encode())
    return f"{name} {digest.hexdigest()[:16]}"


def text_identity(text: Prompts) -> str | None:
    """The tokenizers and text encoders of a pipeline by its class and a hash of them; None where not all are here."""
    digest = hashlib.sha256(str(text.index.get("force_zeros_for_empty_prompt", True)).encode())
    for part in text_parts(text.index):
        said = {file for pattern in _TEXT_FILES for file in (text.folder / part).glob(pattern)}
        kind = WEIGHTS if part == PROJECTION else ENCODER_WEIGHTS
        files = sorted({*weight_paths(text.folder / part, kind, text.variant), *said})
        if not files:
            return None
        for file in files:
            is_config = file.suffix == ".json" and "config" in file.name
            digest.update(f"{part} {file.name} {_plain(read_json(file)) if is_config else _digest(file)}".encode())
    return f"{text.pipeline} {digest.hexdigest()[:16]}"


def kept_null(text: Prompts, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """``text.null()``, from the cache where these encoders have been asked before: they need not be loaded for it."""
    known = text_identity(text)
    file = cache_folder() / "null" / f"{str(known).replace(' ', '-')}.safetensors"
    if known is None or not file.is_file():
        null = {name: value.cpu().contiguous() for name, value in text.null(device).items()}
        if known is None:
            return null
        replace_file(file, save(null))
    return {name: value.to(device) for name, value in read_shard(file).items()}


def _plain(config: dict[str, Any]) -> str:
    kept = {key: value for key, value in config.items() if not key.startswith("_") and key not in _NOT_THE_MODEL}
    return json.dumps(kept, sort_keys=True, default=str)


def _digest(file: Path) -> str:
    """The hash of a file, which is read once: after that, it is known by its place, size and time."""
    if why := no_file(file):
        raise ValueError(f"{file} cannot be read: {why}")
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:32]
    note = cache_folder() / "hashes" / key
    if not note.is_file():
        with file.open("rb") as opened:
            replace_file(note, hashlib.file_digest(opened, "sha256").hexdigest().encode())
    return note.read_text()
