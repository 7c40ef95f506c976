"""The latent space of a latent model: what its VAE makes of images, and images again."""

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.common.errors import shown, unknown
from fewstep.common.model_files import check_weights, load_weights, read_json
from fewstep.networks import FAMILIES
from fewstep.pipelines.latent_images import decode, encode

KNOWN_VAES = (
    "AutoencoderDC",
    "AutoencoderKL",
    "AutoencoderKLCogVideoX",
    "AutoencoderKLFlux2",
    "AutoencoderKLHunyuanImage",
    "AutoencoderKLLTXVideo",
    "AutoencoderKLQwenImage",
    "AutoencoderKLWan",
    "AutoencoderOobleck",
    "AutoencoderTiny",
    "VQModel",
)
_OF_VIDEOS = ("AutoencoderKLCogVideoX", "AutoencoderKLLTXVideo", "AutoencoderKLWan")
# Where pipelines have their VAE.
VAE_FOLDERS = ("vae", "vqvae", "movq")
# Images in one call of the decoder: its activations are large, those of the model it decodes for are not.
_AT_ONCE = 4


class Latents:
    """Images (B, C, H, W) in [-1, 1] as latents (B, c, h, w) in the units of the model, and back; of a video model,
    videos (B, C, F, H, W) as (B, c, f, h, w), and of one of sound waveforms (B, C, L) as (B, c, l).

    The VAE is loaded when it is first needed, and goes where the tensors are. Copies of a model share it.

    Args:
        source: the folder of a VAE, of a pipeline with one, or the VAE itself, of a class in ``KNOWN_VAES``.
        variant: of the weights in the folder, such as fp16, where they are there (see ``model_files.variant_in``).

    Raises:
        FileNotFoundError: no VAE in the folder.
        ValueError: a VAE of another class.

    >>> latents = Latents("./stable-diffusion")
    >>> images = latents.decode(fewstep.sample(field, noise, steps=50))
    """

    def __init__(self, source: str | Path | Any, variant: str | None = None) -> None:
        self.variant = variant
        if isinstance(source, str | Path):
            self.folder = _vae_folder(Path(source).expanduser())
            config = read_json(self.folder / "config.json")
            self._class = config.get("_class_name", "of no class")
        else:
            self.folder, config, self._class = None, dict(source.config), type(source).__name__
            self.vae = source.eval().requires_grad_(False)
        if self._class not in KNOWN_VAES:
            raise unknown("VAE", self._class, KNOWN_VAES)
        self.is_video = self._class in _OF_VIDEOS
        self.is_sound = self._class == "AutoencoderOobleck"
        # Of sound: how many numbers of a waveform are a second.
        self.rate = sound_of(config)[1] if self.is_sound else None
        # Channels of its latents and images; how many pixels of an image are one of its latents, along each side; and
        # how many frames of a video, after the first.
        self.channels, self.image_channels, self.factor, self._frames = _sizes(self._class, config)

    @cached_property
    def vae(self) -> Any:
        """The VAE, frozen, in evaluation mode."""
        import diffusers

        assert self.folder is not None
        return load_weights(getattr(diffusers, self._class), self.folder, self.variant).eval().requires_grad_(False)

    def check(self) -> None:
        """That the weights of the VAE are there and whole, without loading them.

        Raises:
            FileNotFoundError, ValueError: they are not.
        """
        if self.folder is not None:
            check_weights(self.folder, variant=self.variant)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Latents":
        return self

    def shape_of(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape (c, h, w) of the latents of an image (C, H, W).

        Raises:
            ValueError: an image that the VAE does not take.
        """
        if len(image_shape) != 3 + self.is_video - self.is_sound:
            kind, axes = ("videos", "(C, F, H, W)") if self.is_video else ("images", "(C, H, W)")
            kind, axes = ("waveforms", "(C, L)") if self.is_sound else (kind, axes)
            raise ValueError(f"the VAE takes {kind} {axes}, these have the shape {image_shape}")
        if image_shape[0] != self.image_channels:
            what = "waveforms" if self.is_sound else "images"
            raise ValueError(f"the VAE takes {what} of {self.image_channels} channels, these have {image_shape[0]}")
        if self.is_sound:
            length = image_shape[1]
            if length % self.factor or not length:
                raise ValueError(
                    f"waveforms of {length} numbers: the VAE makes one latent of {self.factor}, so a multiple of that "
                    "is needed: add silence, or cut them"
                )
            return self.channels, length // self.factor
        _, *frames, height, width = image_shape
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"images of {height} x {width}: the VAE makes one latent of {self.factor} x {self.factor} pixels, so "
                f"both sides must be multiples of {self.factor}"
            )
        if wrong := [count for count in frames if count % self._frames != 1]:
            raise ValueError(f"videos of {wrong[0]} frames: the VAE takes a first one, and multiples of {self._frames}")
        frames = [(count - 1) // self._frames + 1 for count in frames]
        return self.channels, *frames, height // self.factor, width // self.factor

    def image_shape_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape (C, H, W) of the image of latents (c, h, w)."""
        if self.is_sound:
            return self.image_channels, shape[-1] * self.factor
        frames = [(count - 1) * self._frames + 1 for count in shape[1:-2]]
        return self.image_channels, *frames, shape[-2] * self.factor, shape[-1] * self.factor

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The latents (B, c, h, w) of images (B, C, H, W) in [-1, 1].

        Args:
            generator: draws them from the posterior of the VAE; its mean if not given.

        Raises:
            ValueError: images that the VAE does not take.
        """
        self.shape_of(tuple(images.shape[1:]))
        return encode(self.vae.to(images.device), images, generator).to(images.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """The images (B, C, H, W) in [-1, 1] of latents (B, c, h, w); with their gradient, where latents need one.

        Raises:
            ValueError: latents of another number of channels than the VAE's.
        """
        if latents.ndim != 4 + self.is_video - self.is_sound or latents.shape[1] != self.channels:
            axes = "f, h, w" if self.is_video else "l" if self.is_sound else "h, w"
            raise ValueError(f"latents of shape {tuple(latents.shape)}: this VAE decodes (B, {self.channels}, {axes})")
        at_once = 1 if self.is_video or self.is_sound else _AT_ONCE
        return decode(self.vae.to(latents.device), latents, at_once).to(latents.dtype)


def _sizes(kind: str, config: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Of a VAE of this class: channels of its latents and of its images, pixels of a latent along a side, and frames.

    Raises:
        ValueError: its config does not say them.
    """
    if kind == "AutoencoderKLWan":
        sides = _number(config, "scale_factor_spatial", 8), _number(config, "scale_factor_temporal", 4)
        images = _number(config, "in_channels", 3) // _number(config, "patch_size", 1) ** 2
        return _number(config, "z_dim", 16), images, *sides
    if kind == "AutoencoderKLQwenImage":
        halves = config.get("temperal_downsample", (False, True, True))
        return _number(config, "z_dim", 16), _number(config, "input_channels", 3), 2 ** len(halves), 1
    if kind == "AutoencoderKLLTXVideo":
        halves = 2 ** sum(config.get("spatio_temporal_scaling", (True, True, True, False)))
        sides = _number(config, "patch_size", 4) * halves, _number(config, "patch_size_t", 1) * halves
        return _number(config, "latent_channels", 128), _number(config, "in_channels", 3), *sides
    if kind == "AutoencoderOobleck":
        channels = _number(config, "decoder_input_channels", 64), _number(config, "audio_channels", 2)
        return *channels, sound_of(config)[0], 1
    levels = config.get("block_out_channels") or config.get("encoder_block_out_channels") or (64,)
    if not isinstance(levels, list | tuple):
        raise ValueError(f"the config of this {kind} has the block_out_channels {shown(levels)}, and a list is needed")
    factor = _number(config, "spatial_compression_ratio", 2 ** (len(levels) - 1))
    channels = _number(
        config,
        "latent_channels",
        {"VQModel": 3, "AutoencoderDC": 32, "AutoencoderKLFlux2": 32, "AutoencoderKLCogVideoX": 16}.get(kind, 4),
    )
    patch = 2 if kind == "AutoencoderKLFlux2" else 1  # the model sees 2 x 2 patches of its latents
    frames = _number(config, "temporal_compression_ratio", 4) if kind == "AutoencoderKLCogVideoX" else 1
    return channels * patch**2, _number(config, "in_channels", 3), factor * patch, frames


def sound_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Of a VAE of sound: how many numbers of a waveform are one of its latents, and how many a second.

    Raises:
        ValueError: its config does not say them.
    """
    lengths = config.get("downsampling_ratios", (2, 4, 4, 8, 8))
    if not isinstance(lengths, list | tuple) or not all(type(one) is int and one > 0 for one in lengths):
        raise ValueError(
            f"the config of the VAE has downsampling_ratios {shown(lengths)}, and numbers are needed: fetch it again"
        )
    return math.prod(lengths), _number(config, "sampling_rate", 44100)


def _number(config: Mapping[str, Any], key: str, usual: int) -> int:
    """What the config of a VAE has under a key, where it is more than nothing.

    Raises:
        ValueError: it is no number.
    """
    value = config.get(key) or usual
    if type(value) is not int or value < 1:
        raise ValueError(f"the config of the VAE has {key} {shown(value)}, and a number is needed: fetch it again")
    return value


def _vae_folder(folder: Path) -> Path:
    for place in (folder, *(folder / name for name in VAE_FOLDERS)):
        config = read_json(place / "config.json")
        # What lies in the folder itself may be a bare network.
        if config and (place != folder or config.get("_class_name") not in FAMILIES):
            return place
    raise FileNotFoundError(
        f"no VAE in {folder}: the folder of a VAE has config.json, that of a pipeline vae/config.json"
    )
