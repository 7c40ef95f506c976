"""Images from a two-time flow map, in as many network calls as you ask for: 1, 2, 4, 8.

The map ``X_{s,t}`` carries a state at time s to time t along a probability-flow ODE in one call,

    X_{s,t}(x) = x + (t - s) u(x, s, t),

where t = 0 is noise and t = 1 an image. This file needs torch and diffusers alone::

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("this/folder", trust_remote_code=True)
    images = pipe(batch_size=4, num_inference_steps=2).images
"""

import math
from bisect import bisect_left
from itertools import pairwise
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    FlowMapEulerDiscreteScheduler,
    ImagePipelineOutput,
    UNet2DModel,
    VQModel,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

Generators = torch.Generator | list[torch.Generator] | None


class FlowMapPipeline(DiffusionPipeline):
    """Samples images (B, C, H, W) from a flow map on the straight path ``x_t = t image + (1 - t) noise``.

    Args:
        unet: the network. Its first timestep is s; its second, t, goes in as ``class_labels``, behind the label where
            the model has classes, and before the strength of guidance where it is told that. It predicts diffusers'
            flow (noise - image), averaged from s to t, unless:
        diffusion: for a map distilled from another model, what the network still speaks. Of a diffusion model
            ``{"prediction_type": "epsilon", "sample" or "v_prediction", "log_ratios": [...]}``, the latter
            log(alpha / sigma) of every step of the schedule, falling; of EDM (arXiv 2206.00364) with ``sigma_data``,
            ``sigma_min`` and ``sigma_max`` in their place. ``{"prediction_type": "velocity"}`` is image - noise, by a
            network whose timesteps run from noise to image.
        scheduler: the times of the steps.
        gamma: the default of a call: 1 for a map that only knows the way to the image (a consistency model).
        guidance: the default of a call's ``guidance_scale``, None for 1.
        vae: of a map in the latent space of a VAE: what makes images of its latents.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: FlowMapEulerDiscreteScheduler,
        diffusion: dict | None = None,
        gamma: float = 0.0,
        guidance: float | None = None,
        vae: AutoencoderKL | AutoencoderTiny | VQModel | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        self.register_to_config(diffusion=diffusion, gamma=gamma, guidance=guidance)
        self._diffusion = diffusion or {}
        # The timestep of pure noise.
        has_table = "log_ratios" in self._diffusion
        self._last = len(self._diffusion["log_ratios"]) - 1 if has_table else scheduler.config["num_train_timesteps"]
        # The state's channels; behind them an image goes in where more do, and a variance may come out.
        takes, gives = unet.config["in_channels"], unet.config["out_channels"]
        self._channels = min(takes, gives or takes)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        num_inference_steps: int = 4,
        class_labels: int | list[int] | Tensor | None = None,
        image: Tensor | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        gamma: float | None = None,
        guidance_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Images in ``num_inference_steps`` network calls.

        Args:
            batch_size: how many; by default as many as there are latents, images, labels or generators, else one.
            class_labels: for a class-conditional model, one for all images or one for each.
            image: for a model that takes one beside the state, (B, C', H, W) with the H and W of the state, in the
                units that it was trained with: [-1, 1] for pictures.
            generator: the source of all noise; a list with one generator an image fixes each image by itself.
            latents: the noise to start from, (B, C, H, W).
            gamma: fresh noise between the steps, from 0 (none: deterministic) to 1 (all: consistency sampling); by
                default what the model was trained for.
            guidance_scale: the strength of guidance, for a model that is told it; it costs no further call. 1 is none,
                and the default if the model has no other.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), the latter two in [0, 1].
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}: at least one is needed")
        gamma = float(self.config["gamma"]) if gamma is None else gamma
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma is {gamma}: it runs from 0 (deterministic) to 1 (consistency sampling)")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type is {output_type!r}: it is 'pil', 'np' or 'pt'")
        lengths = [len(given) for given in (latents, image, generator) if isinstance(given, Tensor | list)]
        labels = None if class_labels is None else torch.as_tensor(class_labels)
        if labels is not None and labels.ndim:
            lengths.append(len(labels))
        count = batch_size or (lengths[0] if lengths else 1)
        if any(length != count for length in lengths):
            named = "latents, images, generators or class_labels"
            raise ValueError(f"{count} images, but {lengths} {named}: one each is needed")
        labels = self._check_labels(labels, count)
        if guidance_scale is not None and not self._is_told_guidance:
            raise ValueError(f"guidance_scale is {guidance_scale}, and this model is not told any: leave it out")
        strength = self.config["guidance"] if guidance_scale is None else guidance_scale
        strength = 1.0 if strength is None else strength

        device = self._execution_device
        # The state stays in float32, whatever the type of the network.
        x = self._noise(count, generator, device) if latents is None else latents.to(device, torch.float32)
        beside = self._check_image(image, x)
        cond = (labels, strength, beside)
        # The scheduler counts noise levels down from 1 to 0; here time runs up.
        self.scheduler.set_timesteps(num_inference_steps)
        times = (1 - self.scheduler.sigmas).to("cpu", torch.float32)
        for s, t in self.progress_bar(list(pairwise(times))):  # pyright: ignore
            if gamma == 0 or float(t) == 1:
                x = self._map(x, s, t, *cond)
                continue
            # Go on to r, where the noise is sqrt(1 - gamma^2) of that at t beside the image, and bring new noise in.
            r = t / (t + math.sqrt(1 - gamma**2) * (1 - t))
            x = t / r * self._map(x, s, r, *cond) + gamma * (1 - t) * self._noise(count, generator, device)

        images: Any = ((x if self.vae is None else self._decode(x)) / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def _is_told_guidance(self) -> bool:
        return getattr(self.unet.class_embedding, "strength", None) is not None

    def _map(
        self, x: Tensor, s: Tensor, t: Tensor, labels: Tensor | None, strength: float, beside: list[Tensor]
    ) -> Tensor:
        """``X_{s,t}(x)``: one network call."""
        scale, timestep, x_part, network_part = self._coefficients(s)
        first = torch.full((len(x),), timestep, device=x.device)
        second = torch.full((len(x),), self._second_timestep(t), device=x.device)
        if labels is not None or self._is_told_guidance:
            label = torch.zeros_like(second) if labels is None else labels.to(second)
            told = [torch.full_like(second, strength)] if self._is_told_guidance else []
            second = torch.stack([label, second, *told], dim=-1)
        dtype = self.unet.dtype
        with torch.autocast(x.device.type, dtype, enabled=dtype in (torch.float16, torch.bfloat16)):
            state = torch.cat([scale * x, *beside], dim=1).to(dtype)
            prediction = self.unet(state, first, class_labels=second).sample[:, : x.shape[1]]
        return x + (t - s) * (x_part * x + network_part * prediction.float())

    def _second_timestep(self, time: Tensor) -> float:
        """Where the map is to end, as the network is told it."""
        kind, deviation = self._diffusion.get("prediction_type"), self._diffusion.get("sigma_data")
        if deviation is None:
            return float((time if kind == "velocity" else 1 - time) * self._last)
        ends = math.log(self._diffusion["sigma_min"]), math.log(self._diffusion["sigma_max"])
        level = torch.sin((1 - time) * (math.pi / 2)) / (torch.sin(time * (math.pi / 2)) / deviation)
        return float(level.log().clamp(*ends) / 4)

    def _coefficients(self, time: Tensor) -> tuple[float, float, float, float]:
        """How the network gives a velocity at this time: (c, k, p, q) in ``u = p x + q network(c x, k)``.

        A diffusion model and the straight path agree, up to a scale, where their signal-to-noise ratios do. There the
        network is asked, its prediction gives the image and the noise, and these the velocity, image - noise
        (arXiv 2506.02221).
        """
        kind, deviation = self._diffusion.get("prediction_type"), self._diffusion.get("sigma_data")
        if kind is None:
            return 1.0, float((1 - time) * self._last), 0.0, -1.0
        if kind == "velocity":
            return 1.0, float(time * self._last), 0.0, 1.0
        s = float(time)
        ratio = math.log(s / (1 - s)) if s > 0 else -math.inf
        if deviation is None:
            deviation, table = 1.0, self._diffusion["log_ratios"]
            held = min(max(ratio, table[-1]), table[0])
            after = min(max(bisect_left(table, -held, key=lambda entry: -entry), 1), len(table) - 1)
            timestep = after - (held - table[after]) / (table[after - 1] - table[after])
        else:
            table = [-math.log(self._diffusion[end]) for end in ("sigma_min", "sigma_max")]
            held = min(max(ratio, table[-1]), table[0])
            timestep = -held / 4
        # The network was trained on ``(alpha / deviation) image + sigma noise`` with alpha^2 + sigma^2 = 1.
        odds = held + math.log(deviation)
        alpha, sigma = 1 / math.sqrt(1 + math.exp(-2 * odds)), 1 / math.sqrt(1 + math.exp(2 * odds))
        scale = math.hypot(alpha / deviation, sigma) / math.hypot(s, 1 - s)

        # image = image_x x + image_f F and noise = noise_x x + noise_f F, for the network's prediction F
        if kind == "sample":
            image_x, image_f, noise_x, noise_f = 0.0, 1.0, scale / sigma, -alpha / sigma
        elif kind == "epsilon" and "sigma_data" not in self._diffusion:
            image_x, image_f, noise_x, noise_f = scale / alpha, -sigma / alpha, 0.0, 1.0
        else:
            v = 1 if kind == "v_prediction" else -1  # what EDM calls epsilon is -v
            image_x, image_f = deviation * alpha * scale, -v * deviation * sigma
            noise_x, noise_f = sigma * scale, v * alpha
        # Beyond an end of the schedule the network is asked at its last step, and of its two estimates the one that
        # means something there is kept: the image towards noise, the noise towards the image.
        if ratio <= table[-1]:
            noise_x, noise_f = (1 - s * image_x) / (1 - s), -s * image_f / (1 - s)
        elif ratio >= table[0]:
            image_x, image_f = (1 - (1 - s) * noise_x) / s, -(1 - s) * noise_f / s
        return scale, timestep, image_x - noise_x, image_f - noise_f

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

    def _noise(self, count: int, generator: Generators, device: torch.device) -> Tensor:
        size = self.unet.config["sample_size"]
        if size is None:
            raise ValueError("this model has no fixed size: pass the noise to start from as latents (B, C, H, W)")
        height, width = (size, size) if isinstance(size, int) else size
        shape = (count, self._channels, height, width)
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    def _check_labels(self, labels: Tensor | None, count: int) -> Tensor | None:
        classes = self.unet.config["num_class_embeds"]
        if (labels is None) != (classes is None):
            raise ValueError(f"class_labels are needed, 0 to {classes - 1}" if classes else "this model has no classes")
        if labels is None:
            return None
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"class_labels run from 0 to {classes - 1}, these from {labels.min()} to {labels.max()}")
        return labels.expand(count)

    def _check_image(self, image: Tensor | None, x: Tensor) -> list[Tensor]:
        """What stands beside the state: the image, or nothing."""
        channels = self.unet.config["in_channels"] - self._channels
        if not channels:
            if image is not None:
                raise ValueError("this model takes no image beside the state: leave image out")
            return []
        wanted = (len(x), channels, *x.shape[2:])
        if image is None:
            raise ValueError(f"this model takes an image beside the state: image of shape {wanted} is needed")
        if tuple(image.shape) != wanted:
            raise ValueError(f"image has shape {tuple(image.shape)}, this model needs {wanted}")
        return [image.to(x)]
