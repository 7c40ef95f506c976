"""Images from a two-time flow map, in as many network calls as you ask for: 1, 2, 4, 8.

The map ``X_{s,t}`` carries a state at time s to time t along a probability-flow ODE in one call,

    X_{s,t}(x) = x + (t - s) u(x, s, t),

where t = 0 is noise and t = 1 an image. This file needs torch and diffusers alone, and transformers for prompts::

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("this/folder", trust_remote_code=True)
    images = pipe(batch_size=4, num_inference_steps=2).images
"""

import inspect
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, FlowMapEulerDiscreteScheduler, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

"""The second time of a ``UNet2DModel`` of diffusers' own class (``class_embed_type="timestep"``) in any type.

It is part of the ``pipeline.py`` of an export, so it needs torch alone.
"""

from typing import Any

from torch import Tensor, nn


def takes_any_type(model: Any) -> None:
    """Have a model with ``class_embed_type="timestep"`` bring what it embeds of a class to the type of its weights:
    diffusers does so with what it embeds of the time, and leaves this in float32."""
    embedding = model.class_embedding
    if in_its_type not in embedding._forward_pre_hooks.values():
        embedding.register_forward_pre_hook(in_its_type)


def in_its_type(embedding: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a module is given, in the type of its weights."""
    dtype = next(embedding.parameters()).dtype
    return tuple(value.to(dtype) for value in args)
"""What a call of the pipeline asks for, checked before anything is computed.

It is part of the ``pipeline.py`` of an export, so it needs torch alone.
"""

from numbers import Integral
from typing import Any

import torch
from torch import Tensor


def check_whole(name: str, value: Any) -> None:
    """That a number is whole, and not below 1."""
    if not isinstance(value, Integral) or int(value) < 1:
        raise ValueError(f"{name} is {value!r}: a whole number from 1 on is needed")


def check_prompt(prompt: Any) -> None:
    """That prompts are a text or a list of texts."""
    texts = prompt if isinstance(prompt, list) else [prompt]
    if prompt is not None and not all(isinstance(text, str) for text in texts):
        raise ValueError(f"prompt is {prompt!r}: a text, or a list of texts, is needed")


def count_of(batch_size: int | None, given: list[Any]) -> int:
    """How many images: ``batch_size``, or by default as many as there are of what is given."""
    lengths = [len(g) for g in given if isinstance(g, list) or (isinstance(g, Tensor) and g.ndim)]
    count = batch_size if batch_size is not None else lengths[0] if lengths else 1
    check_whole("the number of images", count)
    if any(length != count for length in lengths):
        named = "prompts, latents, images, generators, conditions or class_labels"
        raise ValueError(f"{count} images, but {lengths} {named}: one each is needed")
    return count


def sizes_of(height: int | None, width: int | None, own: Any, factor: int, config: Any) -> tuple[int, ...]:
    """The sizes of a state, of images of this height and width in pixels.

    Args:
        own: those that the model was made for, a number where they are equal; None where there are none.
        factor: how many pixels a latent is, along each side.
        config: of the network.
    """
    if own is None and (height is None or width is None):
        other = "or the noise to start from as latents (B, C, H, W)"
        raise ValueError(f"this model has no fixed size: pass height and width, {other}")
    own, step = (own, own) if isinstance(own, int) else own or (None, None), factor * side_step(config)
    for name, side in (("height", height), ("width", width)):
        if side is not None and (not isinstance(side, Integral) or side < 1 or side % step):
            raise ValueError(f"{name} is {side}: this model makes images of multiples of {step} pixels")
    rows, columns = (None if side is None else side // factor for side in (height, width))
    return *own[:-2], rows or own[-2], columns or own[-1]


def check_state(shape: tuple[int, ...], channels: int, dims: int, config: Any) -> None:
    """That the network takes states of this shape, (B, channels, ...) with ``dims`` dimensions."""
    if len(shape) != dims or shape[1] != channels:
        raise ValueError(f"latents have shape {shape}: noise (B, {channels}, ...) of {dims} dimensions is needed")
    if any(size < 1 or size % side_step(config) for size in shape[-2:]):
        raise ValueError(f"latents have shape {shape}: this model takes sides of multiples of {side_step(config)}")
    if _is_dit(config) and shape[-1] != shape[-2]:
        raise ValueError(f"states of {shape[-2]} x {shape[-1]} are asked for: this model makes squares alone")


def numbers(labels: Any, names: dict[str, str]) -> Tensor:
    """Classes by number, as they are or by their names."""
    if isinstance(labels, str) or (isinstance(labels, list) and any(isinstance(label, str) for label in labels)):
        known = {name.strip(): int(number) for number, many in names.items() for name in many.split(",")}
        named = [labels] if isinstance(labels, str) else labels
        if unknown := [name for name in named if name not in known]:
            raise ValueError(f"there is no class {unknown[0]!r}; known: {', '.join(known) or 'none by name'}")
        labels = known[labels] if isinstance(labels, str) else [known[name] for name in labels]
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or found.ndim > 1 or (found.numel() and (found.is_floating_point() or found.dtype == torch.bool)):
        raise ValueError(f"class_labels are {labels!r}: one number or name for all images, or a list of one each")
    return found


def check_labels(labels: Tensor | None, config: Any) -> None:
    """That a network has classes of these numbers, and is told one where it has any."""
    # Both transformers of this family name a number, and for the one with this norm it is that of its classes.
    classes = config["num_embeds_ada_norm"] if _is_dit(config) else config.get("num_class_embeds")
    if (labels is None) != (classes is None):
        raise ValueError(f"class_labels are needed, 0 to {classes - 1}" if classes else "this model has no classes")
    if labels is not None and labels.numel() and (labels.min() < 0 or labels.max() >= classes):
        raise ValueError(f"class_labels run from 0 to {classes - 1}, these from {labels.min()} to {labels.max()}")


def check_image(image: Any, wanted: tuple[int, ...]) -> None:
    """That what stands beside the state has the shape that is wanted, and is not given where that has no channels."""
    if not wanted[1]:
        if image is not None:
            raise ValueError("this model takes no image beside the state: leave image out")
    elif image is None:
        raise ValueError(f"this model takes an image beside the state: image of shape {wanted} is needed")
    elif not isinstance(image, Tensor) or tuple(image.shape) != wanted:
        found = f"has shape {tuple(image.shape)}" if isinstance(image, Tensor) else f"is a {type(image).__name__}"
        raise ValueError(f"image {found}, this model needs {wanted}")


def _is_dit(config: Any) -> bool:
    return config.get("norm_type") == "ada_norm_zero"


def side_step(config: Any) -> int:
    """Of what number both sides of a state are multiples: by the halvings of a U-Net, or the patches of a transformer.
    U-Nets of text pad what they halve."""
    if "block_out_channels" in config:
        return 1 if "cross_attention_dim" in config else 2 ** (len(config["block_out_channels"]) - 1)
    patch = 2 if "axes_dims_rope" in config else config.get("patch_size") or 1
    return patch if isinstance(patch, int) else patch[-1]
"""Images of latents.

It is part of the ``pipeline.py`` of an export, so it needs torch alone.
"""

from typing import Any

import torch
from torch import Tensor


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] from latents in the units of the network."""
    config, shift = vae.config, vae.config.get("shift_factor") or 0.0
    scale, mean, deviation = (config.get(key) for key in ("scaling_factor", "latents_mean", "latents_std"))
    scale = 1.0 if scale is None else scale
    if mean is not None and deviation is not None:
        each = (1, -1, *[1] * (latents.ndim - 2))
        shift, deviation = (torch.tensor(v, device=latents.device).reshape(each) for v in (mean, deviation))
        scale = scale / deviation
    options = {}
    if config.get("norm_type") == "spatial":  # Kandinsky's
        shift, scale, options = 0.0, 1.0, {"force_not_quantize": True}
    # Few in one call: the activations of a decoder are large.
    parts = [vae.decode((part / scale + shift).to(vae.dtype), **options).sample for part in latents.split(4)]
    return torch.cat(parts).clamp(-1, 1).float()


def factor_of(vae: Any) -> int:
    """How many pixels a latent is, along each side, by the resolutions of a VAE, each half the one before."""
    if vae is None:
        return 1
    levels = vae.config.get("block_out_channels") or vae.config.get("encoder_block_out_channels") or [64]
    return 2 ** (len(levels) - 1)
"""How the network of a flow map, which was trained as another model, is asked and answers on the straight path.

A map that was distilled from a diffusion model goes on predicting what that predicts, at the steps of its schedule.
These functions translate. They are part of the ``pipeline.py`` of an export, so they need torch alone.
"""

import math
from bisect import bisect_left
from typing import Any

import torch
from torch import Tensor

"""Where a diffusion model is asked: on its schedule, and where its prediction means something.

It is part of the code of exports and of converted models, so it needs nothing.
"""

import math
from typing import Any

# Where a prediction loses its meaning (noise at no signal, data at no noise) the ratio of the two is held at this:
# beyond, an error of the network would count more than a thousandfold.
HOLD = math.log(1000.0)


def held_ratios(diffusion: dict[str, Any]) -> tuple[float, float]:
    """The log(data / noise) between which a network is asked.

    Args:
        diffusion: what it speaks, as the folders say it; see ``flow_model.FromDiffusion``.
    """
    low, high = -math.inf, math.inf
    if "sigma_data" in diffusion:
        low, high = -math.log(diffusion["sigma_max"]), -math.log(diffusion["sigma_min"])
    elif "log_ratios" in diffusion:
        high, *_, low = diffusion["log_ratios"]
        low = -math.inf if diffusion.get("ends_in_noise") else low
    kind = diffusion["prediction_type"]
    if kind == "epsilon" and "sigma_data" not in diffusion:  # what EDM calls epsilon is -v
        low = max(low, -HOLD)
    return low, min(high, HOLD) if kind == "sample" else high


def second_timestep(diffusion: dict[str, Any], time: Tensor, last: float, alike: bool = False) -> float:
    """Where the map is to end, at time t (0 noise, 1 image), as the network is told it.

    Args:
        diffusion: what the network speaks, see ``FlowMapPipeline``; empty for diffusers' flow.
        last: the timestep of pure noise.
        alike: told as the first time is, by the signal-to-noise ratio there. Otherwise no two times are told as one,
            as those beyond an end of a schedule are by their ratios.
    """
    kind, deviation = diffusion.get("prediction_type"), diffusion.get("sigma_data")
    if alike and kind not in (None, "velocity"):
        return _place(diffusion, float(time))[-1]
    if deviation is None:
        return float((time if kind == "velocity" else 1 - time) * last)
    ends = math.log(diffusion["sigma_min"]), math.log(diffusion["sigma_max"])
    level = torch.sin((1 - time) * (math.pi / 2)) / (torch.sin(time * (math.pi / 2)) / deviation)
    return float(level.log().clamp(*ends) / 4)


def coefficients(diffusion: dict[str, Any], time: Tensor, last: float) -> tuple[float, float, float, float]:
    """How the network gives a velocity at this time: (c, k, p, q) in ``u = p x + q network(c x, k)``.

    A diffusion model and the straight path agree, up to a scale, where their signal-to-noise ratios do. There the
    network is asked, its prediction gives the image and the noise, and these the velocity, image - noise
    (arXiv 2506.02221).
    """
    kind, deviation = diffusion.get("prediction_type"), diffusion.get("sigma_data")
    if kind is None:
        return 1.0, float((1 - time) * last), 0.0, -1.0
    if kind == "velocity":
        return 1.0, float(time * last), 0.0, 1.0
    s, deviation = float(time), deviation or 1.0
    (low, high), ratio, held, timestep = _place(diffusion, s)
    # The network was trained on ``(alpha / deviation) image + sigma noise`` with alpha^2 + sigma^2 = 1, up to a scale.
    odds = held + math.log(deviation)
    alpha, sigma = 1 / math.sqrt(1 + _exp(-2 * odds)), 1 / math.sqrt(1 + _exp(2 * odds))
    if "timesteps" in diffusion:  # on the straight path: that scale is its own
        power = alpha + sigma
        alpha, sigma = alpha / power, sigma / power
    scale = math.hypot(alpha / deviation, sigma) / math.hypot(s, 1 - s)

    # image = image_x x + image_f F and noise = noise_x x + noise_f F, for the network's prediction F
    if kind == "sample":
        image_x, image_f, noise_x, noise_f = 0.0, 1.0, scale / sigma, -alpha / sigma
    elif kind == "epsilon" and "sigma_data" not in diffusion:
        image_x, image_f, noise_x, noise_f = scale / alpha, -sigma / alpha, 0.0, 1.0
    else:
        v = 1 if kind == "v_prediction" else -1  # what EDM calls epsilon is -v
        image_x, image_f = deviation * alpha * scale, -v * deviation * sigma
        noise_x, noise_f = sigma * scale, v * alpha
    # Beyond an end of the schedule the network is asked at its last step, and of its two estimates the one that
    # means something there is kept: the image towards noise, the noise towards the image.
    if ratio <= low:
        noise_x, noise_f = (1 - s * image_x) / (1 - s), -s * image_f / (1 - s)
    elif ratio >= high:
        image_x, image_f = (1 - (1 - s) * noise_x) / s, -(1 - s) * noise_f / s
    return scale, timestep, image_x - noise_x, image_f - noise_f


def _place(diffusion: dict[str, Any], time: float) -> tuple[tuple[float, float], float, float, float]:
    """Where a time is on a schedule: between which log(alpha / sigma) the network is asked, that at the time, the
    nearest to it of those, and the timestep there."""
    ratio = math.inf if time == 1 else math.log(time / (1 - time)) if time > 0 else -math.inf
    low, high = held_ratios(diffusion)
    held = min(max(ratio, low), high)
    if "sigma_data" in diffusion:
        return (low, high), ratio, held, -held / 4
    if "timesteps" in diffusion:
        return (low, high), ratio, held, diffusion["timesteps"] / (1 + _exp(held))
    table = diffusion["log_ratios"]
    if held < table[-1]:  # between that step and one of noise alone the ratio itself is linear
        return (low, high), ratio, held, len(table) - math.exp(held - table[-1])
    after = min(max(bisect_left(table, -held, key=lambda entry: -entry), 1), len(table) - 1)
    return (low, high), ratio, held, after - (held - table[after]) / (table[after - 1] - table[after])


def _exp(x: float) -> float:
    """exp, of infinity too."""
    return math.inf if x > 700 else math.exp(x)
"""The code of an export, which is part of it: it can write itself beside another one."""

import re
from pathlib import Path


def whole(file: str) -> str:
    """The code in a file, with what it imports from beside it (``.name``, ``..folder.name``) in place of the import: of
    each part of a pipeline diffusers fetches one file."""

    def code(found: re.Match[str]) -> str:
        above = Path(file).parents[len(found[1]) - 1]
        return whole(str(above.joinpath(*found[2].split(".")).with_suffix(".py")))

    line = r"^from (\.+)([\w.]+) import (?:\([^)]*\)|[^(\n]*)\n"
    return re.sub(line, code, Path(file).read_text(), flags=re.MULTILINE)
"""Prompts as conditions of a network, made by the ``encode_prompt`` of the pipeline of diffusers that they belong to.

It is part of the ``pipeline.py`` of an export, so it needs torch and diffusers alone, and transformers for the text
encoders.
"""

import inspect
from typing import Any

from torch import Tensor

# What `encode_prompt` of a pipeline returns, in its order, as conditions of the network; None for what is not needed.
RETURNED: dict[str, tuple[str | None, ...]] = {
    "FluxPipeline": ("encoder_hidden_states", "pooled_projections", None),
    "PixArtAlphaPipeline": ("encoder_hidden_states", "encoder_attention_mask", None, None),
    "PixArtSigmaPipeline": ("encoder_hidden_states", "encoder_attention_mask", None, None),
    "StableDiffusion3Pipeline": ("encoder_hidden_states", None, "pooled_projections", None),
    "StableDiffusionPipeline": ("encoder_hidden_states", None),
    "StableDiffusionXLPipeline": ("encoder_hidden_states", None, "text_embeds", None),
}
# The parts that encode, by their names in every pipeline.
ENCODERS = [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]


def encode(pipeline: str, parts: dict[str, Any], prompts: list[str], device: Any) -> dict[str, Tensor]:
    """The conditions of prompts, a row each, as the pipeline of this name makes them of these parts."""
    import diffusers  # here, as the table above is read where nothing is encoded

    kind = getattr(diffusers, pipeline)
    taken = inspect.signature(kind.__init__).parameters.values()
    own = {p.name: parts.get(p.name) for p in taken if p.default is p.empty and p.name != "self"}
    safety = {"requires_safety_checker": False} if "safety_checker" in own else {}
    made = kind(**{**own, **safety, "scheduler": None})
    options = {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False}
    known = inspect.signature(kind.encode_prompt).parameters
    options = {key: value for key, value in options.items() if key in known}
    returned = made.encode_prompt(prompts, device=device, num_images_per_prompt=1, **options)
    return {key: value for key, value in zip(RETURNED[pipeline], returned, strict=True) if key is not None}

Generators = torch.Generator | list[torch.Generator] | None
# The parts of the pipeline beside its scheduler.
PARTS = ["unet", "transformer", "vae", *ENCODERS]


class FlowMapPipeline(DiffusionPipeline):
    """Samples images (B, C, H, W) from a flow map on the straight path ``x_t = t image + (1 - t) noise``.

    Args:
        scheduler: the times of the steps.
        unet, transformer: the network, one of the two, and None for the other.
            ``network.predict(x, s, t, guidance, **conditions)`` gives diffusers' flow (noise - image), averaged from s
            to t, unless ``diffusion`` says otherwise.
        vae: of a map in the latent space of a VAE: what makes images of its latents, or None.
        text_encoder, tokenizer, ...: those of a model of text, or None.
        diffusion: for a map distilled from another model, what the network still speaks. Of a diffusion model
            ``{"prediction_type": "epsilon", "sample" or "v_prediction", "log_ratios": [...]}``, the latter
            log(alpha / sigma) of every step of the schedule, falling, and ``ends_in_noise`` where one more, of noise
            alone, stands behind them; of EDM (arXiv 2206.00364) with ``sigma_data``, ``sigma_min`` and ``sigma_max`` in
            their place; on the straight path with ``timesteps``, that of pure noise.
            ``{"prediction_type": "velocity"}`` is image - noise, by a network whose timesteps run from noise to image.
        gamma: the default of a call: 1 for a map that only knows the way to the image (a consistency model).
        guidance: the default of a call's ``guidance_scale``, None for 1.
        shape: of one state, (C, H, W); its sizes are the default of a call's. Of the network's config, if not given.
        needs: the conditions without which the network cannot be called, with commas between. (A list in an index
            means a part of the pipeline to diffusers.)
        id2label: what its classes are called, by number; of several names with commas between, each will do.
        text: ``{"pipeline": NAME}``, the class of diffusers whose ``encode_prompt`` makes the conditions of prompts, by
            the text encoders.
        factor: of a map in the latent space of a VAE: how many pixels a latent is, along each side.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->unet->transformer->vae"
    _optional_components: ClassVar[list[str]] = PARTS

    # The parts have no defaults: what has one is no part to diffusers, which would load over what it is passed.
    def __init__(
        self,
        scheduler: FlowMapEulerDiscreteScheduler,
        unet: Any,
        transformer: Any,
        vae: Any,
        text_encoder: Any,
        text_encoder_2: Any,
        text_encoder_3: Any,
        tokenizer: Any,
        tokenizer_2: Any,
        tokenizer_3: Any,
        diffusion: dict | None = None,
        gamma: float = 0.0,
        guidance: float | None = None,
        shape: list[int] | None = None,
        needs: str | None = None,
        id2label: dict[str, str] | None = None,
        text: dict | None = None,
        factor: int | None = None,
    ) -> None:
        super().__init__()
        if unet is None and transformer is None:
            raise ValueError("a FlowMapPipeline is nothing without its network: pass a unet or a transformer")
        one = {"text_encoder": text_encoder, "tokenizer": tokenizer}
        two = {"text_encoder_2": text_encoder_2, "tokenizer_2": tokenizer_2}
        three = {"text_encoder_3": text_encoder_3, "tokenizer_3": tokenizer_3}
        self.register_modules(scheduler=scheduler, unet=unet, transformer=transformer, vae=vae, **one, **two, **three)
        config = {"diffusion": diffusion, "gamma": gamma, "guidance": guidance}
        self.register_to_config(**config, shape=shape, needs=needs, id2label=id2label, text=text, factor=factor)
        self._diffusion = diffusion or {}
        # The timestep of pure noise.
        steps = len(self._diffusion.get("log_ratios", [])) + bool(self._diffusion.get("ends_in_noise"))
        self._last = steps - 1 if steps else scheduler.config["num_train_timesteps"]
        # The state's channels; behind them an image goes in where more do, and a variance may come out.
        takes, gives = self.network.config["in_channels"], self.network.config["out_channels"]
        self._channels = shape[0] if shape else self.network.config.get("_state_channels") or min(takes, gives or takes)
        self._factor = factor or factor_of(vae)
        if not hasattr(self.network, "predict"):
            takes_any_type(self.network)
        self._needs = needs.split(", ") if needs else []

    @property
    def network(self) -> Any:
        """The U-Net or transformer."""
        return self.unet if self.unet is not None else self.transformer

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        batch_size: int | None = None,
        num_inference_steps: int = 4,
        class_labels: int | str | list[int] | list[str] | Tensor | None = None,
        image: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        gamma: float | None = None,
        guidance_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **conditions: Tensor,
    ) -> ImagePipelineOutput | tuple:
        """Images in ``num_inference_steps`` network calls.

        Args:
            prompt: for a model of text, one for all images or one for each.
            batch_size: how many; by default as many as there are prompts, latents, images, labels, conditions or
                generators, else one.
            class_labels: for a class-conditional model, by number or name, one for all images or one for each.
            image: for a model that takes one beside the state, (B, C', H, W) with the H and W of the state, in the
                units that it was trained with: [-1, 1] for pictures.
            height, width: of the images in pixels; by default what the model was made for.
            generator: the source of all noise; a list with one generator an image fixes each image by itself.
            latents: the noise to start from, (B, C, H, W).
            gamma: fresh noise between the steps, from 0 (none: deterministic) to 1 (all: consistency sampling); by
                default what the model was trained for.
            guidance_scale: the strength of guidance, for a model that is told it; it costs no further call. 1 is none,
                and the default if the model has no other.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), the latter two in [0, 1]; or "latent": the state
                as it is. Of videos, states are (B, C, F, H, W), and the others have their frames F behind B.
            conditions: those of the network by its own names, (B, ...), such as ``encoder_hidden_states``: made
                beforehand, in the place of a prompt's.
        """
        if not isinstance(self.scheduler, FlowMapEulerDiscreteScheduler):
            kind = type(self.scheduler).__name__
            raise ValueError(f"scheduler is a {kind}: a FlowMapEulerDiscreteScheduler has the times of a flow map")
        check_whole("num_inference_steps", num_inference_steps)
        check_prompt(prompt)
        gamma = float(self.config["gamma"]) if gamma is None else gamma
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma is {gamma}: it runs from 0 (deterministic) to 1 (consistency sampling)")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type is {output_type!r}: it is 'pil', 'np', 'pt' or 'latent'")
        if output_type != "latent" and self.vae is None and self.config["factor"]:
            raise ValueError(f"output_type is {output_type!r}, and the VAE is not here: output_type='latent'")
        if guidance_scale is not None and not self._is_told_guidance:
            raise ValueError(f"guidance_scale is {guidance_scale}, and this model is not told any: leave it out")
        if unknown := [name for name, value in conditions.items() if not isinstance(value, Tensor)]:
            raise ValueError(f"{unknown[0]} is no option of this pipeline, and no tensor (B, ...) for its network")
        config = self.network.config
        is_embedded = "class_labels" in self._needs and config.get("class_embed_type") is not None
        if is_embedded and not isinstance(class_labels, Tensor):
            raise ValueError("this model embeds class_labels as numbers: a tensor (B, ...) of them is needed")
        names = self.config["id2label"] or {}
        labels: Any = class_labels if is_embedded or class_labels is None else numbers(class_labels, names)
        if not is_embedded:
            check_labels(labels, config)
        if latents is not None and not isinstance(latents, Tensor):
            raise ValueError(f"latents are a {type(latents).__name__}: a tensor (B, {self._channels}, ...) is needed")
        count = count_of(batch_size, [latents, image, generator, prompt, labels, *conditions.values()])
        shape = self._shape(count, height, width) if latents is None else tuple(latents.shape)
        check_state(shape, self._channels, len(self.config["shape"] or "CHW") + 1, config)
        beside = config["in_channels"] - self._channels if self.unet is not None else 0
        check_image(image, (count, beside, *shape[2:]))

        device = self._execution_device
        # The state stays in float32, whatever the type of the network.
        x = self._noise(shape, generator, device) if latents is None else latents.to(device, torch.float32)
        cond = self._text(prompt, conditions, count, shape[-2:], device)
        if labels is not None:
            cond["class_labels"] = labels.to(device).expand(count, *labels.shape[1:])
        if image is not None:
            cond["image"] = image.to(x)
        strength = self.config["guidance"] if guidance_scale is None else guidance_scale
        if strength is None and "guidance" in self._needs:
            raise ValueError("this model needs the strength of guidance that it was made for: guidance_scale=3.5 or so")
        if strength is not None and self._is_told_guidance:
            cond["guidance"] = torch.full((count,), strength, dtype=torch.float32, device=device)
        # The scheduler counts noise levels down from 1 to 0; here time runs up.
        self.scheduler.set_timesteps(num_inference_steps)
        times = (1 - self.scheduler.sigmas).to("cpu", torch.float32)
        for s, t in self.progress_bar(list(pairwise(times))):  # pyright: ignore
            if gamma == 0 or float(t) == 1:
                x = self._map(x, s, t, **cond)
                continue
            # Go on to r, where the noise is sqrt(1 - gamma^2) of that at t beside the image, and bring new noise in.
            r = t / (t + math.sqrt(1 - gamma**2) * (1 - t))
            x = t / r * self._map(x, s, r, **cond) + gamma * (1 - t) * self._noise(shape, generator, device)

        images: Any = x
        if output_type != "latent":
            images = ((x if self.vae is None else decode(self.vae, x)) / 2 + 0.5).clamp(0, 1)
            images = images.transpose(1, 2) if images.ndim == 5 else images  # a video is a row of frames
        if output_type in ("np", "pil"):
            images = images.cpu().movedim(-3, -1).numpy()
        if output_type == "pil":
            images = [self.numpy_to_pil(v) for v in images] if images.ndim == 5 else self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _map(self, x: Tensor, s: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        """``X_{s,t}(x)``: one network call."""
        scale, timestep, x_part, network_part = coefficients(self._diffusion, s, self._last)
        first = torch.full((len(x),), timestep, device=x.device)
        is_alike = self.network.config.get("second_time", "t") != "t"
        end = second_timestep(self._diffusion, t, self._last, is_alike)
        second = torch.full((len(x),), end, device=x.device)
        dtype = self.network.dtype
        with torch.autocast(x.device.type, dtype, enabled=dtype in (torch.float16, torch.bfloat16)):
            prediction = self._predict((scale * x).to(dtype), first, second, **cond)
        return x + (t - s) * (x_part * x + network_part * prediction.float())

    def _predict(self, x: Tensor, first: Tensor, second: Tensor, **cond: Tensor) -> Tensor:
        if hasattr(self.network, "predict"):
            # By the module in the pipeline, which may be a compiled one around that which has the method.
            return self.network.predict.__func__(self.network, x, first, second, **cond)
        # A stock U-Net, which takes the second time where others take a class.
        state = torch.cat([x, cond["image"].to(x)], dim=1) if "image" in cond else x
        return self.network(state, first, class_labels=second).sample[:, : x.shape[1]]

    @property
    def _is_told_guidance(self) -> bool:
        return any(self.network.config.get(key) for key in ("told_guidance", "guidance_embeds"))

    def _text(
        self, prompt: str | list[str] | None, given: dict[str, Tensor], count: int, sizes: tuple[int, ...], device: Any
    ) -> dict[str, Tensor]:
        """The conditions of text: those that are given, and for what is missing those of the prompts, (B, ...)."""
        pipeline = self._prompted
        height, width = (self._factor * size for size in sizes)
        if prompt is not None and not pipeline:
            raise ValueError(f"prompt is {prompt!r}, and this model has no text encoders: leave it out")
        cond: dict[str, Any] = {}
        if pipeline == "StableDiffusionXLPipeline":
            cond = {"time_ids": [height, width, 0, 0, height, width]}
        elif pipeline.startswith("PixArt") and getattr(self.network, "use_additional_conditions", False):
            cond = {"resolution": [height, width], "aspect_ratio": [height / width]}
        cond = {key: torch.tensor([value], dtype=torch.float32, device=device) for key, value in cond.items()}
        if prompt is not None:
            cond |= encode(pipeline, self.components, [prompt] if isinstance(prompt, str) else prompt, device)
        others = ("class_labels", "image", "guidance", *cond, *given)
        if missing := [name for name in self._needs if name not in others]:
            way = "give it a prompt, or pass" if pipeline else "pass"
            raise ValueError(f"this model needs {missing[0]}, one row an image: {way} {', '.join(missing)}")
        cond = {key: value.expand(count, *value.shape[1:]) for key, value in {**cond, **given}.items()}
        return {key: value.to(device) for key, value in cond.items()}

    def _shape(self, count: int, height: int | None, width: int | None) -> tuple[int, ...]:
        """That of the states of images of this height and width in pixels."""
        config = self.network.config
        own = self.config["shape"][1:] if self.config["shape"] else config.get("sample_size")
        return count, self._channels, *sizes_of(height, width, own, self._factor, config)

    def _noise(self, shape: tuple[int, ...], generator: Generators, device: torch.device) -> Tensor:
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    @property
    def _prompted(self) -> str:
        """The pipeline whose prompts these text encoders encode; empty where one of them was left out."""
        # Without the third, which is large, SD3 encodes all the same.
        pairs = [(getattr(self, f"text_encoder{k}"), getattr(self, f"tokenizer{k}")) for k in ("", "_2")]
        are_whole = all((encoder is None) == (tokenizer is None) for encoder, tokenizer in pairs)
        is_there = any(encoder is not None for encoder, _ in pairs)
        return (self.config["text"] or {}).get("pipeline", "") if are_whole and is_there else ""

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **options: Any) -> None:
        """The index of the pipeline, and the code that it and its network are loaded by: ``save_pretrained``, which
        calls this, writes what an export is."""
        super().save_config(save_directory, push_to_hub, **options)
        folder, part = Path(save_directory), "unet" if self.unet is not None else "transformer"
        index = json.loads((folder / self.config_name).read_text())
        index |= {"_class_name": ["pipeline", "FlowMapPipeline"], "text": index["text"] if self._prompted else None}
        (folder / "pipeline.py").write_text(whole(__file__))
        kind = type(getattr(self.network, "_orig_mod", self.network))
        if not kind.__module__.startswith("diffusers."):
            library = kind.__module__.rpartition(".")[2]
            index[part] = [library, kind.__name__]
            (folder / part / f"{library}.py").write_text(whole(inspect.getfile(kind)))
        (folder / self.config_name).write_text(json.dumps(index, indent=2) + "\n")
