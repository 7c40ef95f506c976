"""Images from a two-time flow map, in as many network calls as you ask for: 1, 2, 4, 8.

The map ``X_{s,t}`` carries a state at time s to time t along a probability-flow ODE in one call,

    X_{s,t}(x) = x + (t - s) u(x, s, t),

where t = 0 is noise and t = 1 an image. This file and the two that it imports need torch and diffusers alone, and
transformers for prompts::

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("this/folder", trust_remote_code=True)
    images = pipe(batch_size=4, num_inference_steps=2).images
"""

import math
from itertools import pairwise
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, FlowMapEulerDiscreteScheduler, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .native_times import coefficients, second_timestep
from .stock_prompts import ENCODERS, encode

Generators = torch.Generator | list[torch.Generator] | None


class FlowMapPipeline(DiffusionPipeline):
    """Samples images (B, C, H, W) from a flow map on the straight path ``x_t = t image + (1 - t) noise``.

    Args:
        scheduler: the times of the steps.
        unet, transformer: the network, one of the two. ``network.predict(x, s, t, guidance, **conditions)`` gives
            diffusers' flow (noise - image), averaged from s to t, unless:
        diffusion: for a map distilled from another model, what the network still speaks. Of a diffusion model
            ``{"prediction_type": "epsilon", "sample" or "v_prediction", "log_ratios": [...]}``, the latter
            log(alpha / sigma) of every step of the schedule, falling; of EDM (arXiv 2206.00364) with ``sigma_data``,
            ``sigma_min`` and ``sigma_max`` in their place. ``{"prediction_type": "velocity"}`` is image - noise, by a
            network whose timesteps run from noise to image.
        gamma: the default of a call: 1 for a map that only knows the way to the image (a consistency model).
        guidance: the default of a call's ``guidance_scale``, None for 1.
        shape: of one state, (C, H, W); its sizes are the default of a call's. Of the network's config, if not given.
        vae: of a map in the latent space of a VAE: what makes images of its latents.
        needs: the conditions without which the network cannot be called.
        id2label: what its classes are called, by number; of several names with commas between, each will do.
        text: ``{"pipeline": NAME}``, the class of diffusers whose ``encode_prompt`` makes the conditions of prompts, by
            the text encoders.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->unet->transformer->vae"
    _optional_components: ClassVar[list[str]] = ["unet", "transformer", "vae", *ENCODERS]

    def __init__(
        self,
        scheduler: FlowMapEulerDiscreteScheduler,
        unet: Any = None,
        transformer: Any = None,
        diffusion: dict | None = None,
        gamma: float = 0.0,
        guidance: float | None = None,
        shape: list[int] | None = None,
        needs: list[str] | None = None,
        id2label: dict[str, str] | None = None,
        vae: Any = None,
        text: dict | None = None,
        text_encoder: Any = None,
        text_encoder_2: Any = None,
        text_encoder_3: Any = None,
        tokenizer: Any = None,
        tokenizer_2: Any = None,
        tokenizer_3: Any = None,
    ) -> None:
        super().__init__()
        one = {"text_encoder": text_encoder, "tokenizer": tokenizer}
        two = {"text_encoder_2": text_encoder_2, "tokenizer_2": tokenizer_2}
        three = {"text_encoder_3": text_encoder_3, "tokenizer_3": tokenizer_3}
        self.register_modules(scheduler=scheduler, unet=unet, transformer=transformer, vae=vae, **one, **two, **three)
        config = {"diffusion": diffusion, "gamma": gamma, "guidance": guidance}
        self.register_to_config(**config, shape=shape, needs=needs, id2label=id2label, text=text)
        self._diffusion = diffusion or {}
        # The timestep of pure noise.
        has_table = "log_ratios" in self._diffusion
        self._last = len(self._diffusion["log_ratios"]) - 1 if has_table else scheduler.config["num_train_timesteps"]
        # The state's channels; behind them an image goes in where more do, and a variance may come out.
        takes, gives = self.network.config["in_channels"], self.network.config["out_channels"]
        self._channels = shape[0] if shape else min(takes, gives or takes)
        self._factor = 1 if vae is None else 2 ** (len(_levels(vae.config)) - 1)

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
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}: at least one is needed")
        gamma = float(self.config["gamma"]) if gamma is None else gamma
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma is {gamma}: it runs from 0 (deterministic) to 1 (consistency sampling)")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type is {output_type!r}: it is 'pil', 'np', 'pt' or 'latent'")
        if guidance_scale is not None and not self._is_told_guidance:
            raise ValueError(f"guidance_scale is {guidance_scale}, and this model is not told any: leave it out")
        if unknown := [name for name, value in conditions.items() if not isinstance(value, Tensor)]:
            raise ValueError(f"{unknown[0]} is no option of this pipeline, and no tensor (B, ...) for its network")
        labels = None if class_labels is None else self._numbers(class_labels)
        self._check_labels(labels)
        several = [latents, image, generator, prompt, labels, *conditions.values()]
        lengths = [len(g) for g in several if isinstance(g, list) or (isinstance(g, Tensor) and g.ndim)]
        count = batch_size or (lengths[0] if lengths else 1)
        if any(length != count for length in lengths):
            named = "prompts, latents, images, generators, conditions or class_labels"
            raise ValueError(f"{count} images, but {lengths} {named}: one each is needed")

        device = self._execution_device
        # The state stays in float32, whatever the type of the network.
        sizes = self._sizes(height, width) if latents is None else tuple(latents.shape[2:])
        x = self._noise(count, sizes, generator, device) if latents is None else latents.to(device, torch.float32)
        cond = self._text(prompt, conditions, count, sizes, device)
        if labels is not None:
            cond["class_labels"] = labels.to(device).expand(count)
        if (beside := self._check_image(image, x)) is not None:
            cond["image"] = beside
        strength = self.config["guidance"] if guidance_scale is None else guidance_scale
        if strength is None and "guidance" in (self.config["needs"] or []):
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
            x = t / r * self._map(x, s, r, **cond) + gamma * (1 - t) * self._noise(count, sizes, generator, device)

        images: Any = x
        if output_type != "latent":
            images = ((x if self.vae is None else self._decode(x)) / 2 + 0.5).clamp(0, 1)
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
        second = torch.full((len(x),), second_timestep(self._diffusion, t, self._last), device=x.device)
        dtype = self.network.dtype
        with torch.autocast(x.device.type, dtype, enabled=dtype in (torch.float16, torch.bfloat16)):
            prediction = self._predict((scale * x).to(dtype), first, second, **cond)
        if prediction.shape != x.shape:  # some transformers take squares alone
            raise ValueError(f"this model makes no images of this size: states of {tuple(x.shape[1:])}")
        return x + (t - s) * (x_part * x + network_part * prediction.float())

    def _predict(self, x: Tensor, first: Tensor, second: Tensor, **cond: Tensor) -> Tensor:
        if hasattr(self.network, "predict"):
            return self.network.predict(x, first, second, **cond)
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
        pipeline = (self.config["text"] or {}).get("pipeline", "")
        height, width = (self._factor * size for size in sizes[-2:])
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
        if missing := [name for name in self.config["needs"] or [] if name not in others]:
            way = "give it a prompt, or pass" if pipeline else "pass"
            raise ValueError(f"this model needs {missing[0]}, one row an image: {way} {', '.join(missing)}")
        cond = {key: value.expand(count, *value.shape[1:]) for key, value in {**cond, **given}.items()}
        return {key: value.to(device) for key, value in cond.items()}

    def _decode(self, latents: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] from latents in the units of the network."""
        vae: Any = self.vae
        config, shift = vae.config, vae.config.get("shift_factor") or 0.0
        scale, mean, deviation = (config.get(key) for key in ("scaling_factor", "latents_mean", "latents_std"))
        scale = 1.0 if scale is None else scale
        if mean is not None and deviation is not None:
            shift, deviation = (torch.tensor(v, device=latents.device).reshape(1, -1, 1, 1) for v in (mean, deviation))
            scale = scale / deviation
        # Few in one call: the activations of a decoder are large.
        parts = [vae.decode((part / scale + shift).to(vae.dtype)).sample for part in latents.split(4)]
        return torch.cat(parts).clamp(-1, 1).float()

    def _sizes(self, height: int | None, width: int | None) -> tuple[int, ...]:
        """The sizes of a state, of images of this height and width in pixels."""
        size = self.config["shape"][1:] if self.config["shape"] else self.network.config.get("sample_size")
        if size is None and (height is None or width is None):
            other = "or the noise to start from as latents (B, C, H, W)"
            raise ValueError(f"this model has no fixed size: pass height and width, {other}")
        size: Any = (size, size) if isinstance(size, int) else size or (None, None)
        for name, asked in (("height", height), ("width", width)):
            if asked is not None and (asked < 1 or asked % self._factor):
                raise ValueError(f"{name} is {asked}: this model makes images of multiples of {self._factor} pixels")
        asked = [None if side is None else side // self._factor for side in (height, width)]
        return *size[:-2], asked[0] or size[-2], asked[1] or size[-1]

    def _noise(self, count: int, sizes: tuple[int, ...], generator: Generators, device: torch.device) -> Tensor:
        shape = (count, self._channels, *sizes)
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    def _numbers(self, labels: Any) -> Tensor:
        """Classes by number, as they are or by their names."""
        if isinstance(labels, str) or (isinstance(labels, list) and any(isinstance(label, str) for label in labels)):
            said = self.config["id2label"] or {}
            known = {name.strip(): int(number) for number, names in said.items() for name in names.split(",")}
            named = [labels] if isinstance(labels, str) else labels
            if unknown := [name for name in named if name not in known]:
                raise ValueError(f"there is no class {unknown[0]!r}; known: {', '.join(known) or 'none by name'}")
            labels = known[labels] if isinstance(labels, str) else [known[name] for name in labels]
        return torch.as_tensor(labels)

    def _check_labels(self, labels: Tensor | None) -> None:
        config = self.network.config
        # Both transformers of this family name a number, and for the one with this norm it is that of its classes.
        is_dit = config.get("norm_type") == "ada_norm_zero"
        classes = config["num_embeds_ada_norm"] if is_dit else config.get("num_class_embeds")
        if (labels is None) != (classes is None):
            raise ValueError(f"class_labels are needed, 0 to {classes - 1}" if classes else "this model has no classes")
        if labels is not None and (labels.min() < 0 or labels.max() >= classes):
            raise ValueError(f"class_labels run from 0 to {classes - 1}, these from {labels.min()} to {labels.max()}")

    def _check_image(self, image: Tensor | None, x: Tensor) -> Tensor | None:
        """What stands beside the state, where it may."""
        takes = self.network.config["in_channels"]
        channels = takes - self._channels if self.unet is not None else 0
        if not channels:
            if image is not None:
                raise ValueError("this model takes no image beside the state: leave image out")
            return None
        wanted = (len(x), channels, *x.shape[2:])
        if image is None:
            raise ValueError(f"this model takes an image beside the state: image of shape {wanted} is needed")
        if tuple(image.shape) != wanted:
            raise ValueError(f"image has shape {tuple(image.shape)}, this model needs {wanted}")
        return image.to(x)


def _levels(vae: Any) -> list[Any]:
    """The resolutions of a VAE, each half the one before, by its config."""
    return vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or [64]
