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
from diffusers import AudioPipelineOutput, DiffusionPipeline, FlowMapEulerDiscreteScheduler, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..networks.channels import patch_of, state_channels
from ..networks.stock_time import takes_any_type
from .adapters import Adapters
from .arguments import (
    check_image,
    check_labels,
    check_prompt,
    check_state,
    check_whole,
    count_of,
    numbers,
    seconds_of,
    sizes_of,
)
from .latent_images import decode, factor_of, heard
from .native_times import coefficients, second_timestep
from .shifts import Shift
from .source import whole
from .stock_prompts import ENCODERS, encode_prompts

Generators = torch.Generator | list[torch.Generator] | None
# The parts of the pipeline beside its scheduler.
PARTS = ["unet", "transformer", "vae", *ENCODERS]
# The library of a network that the folder carries the class of, in `model_index.json`: the name of its file.
CARRIED = "two_times"


class FlowMapPipeline(Adapters, DiffusionPipeline):
    """Samples images (B, C, H, W) from a flow map on the straight path ``x_t = t image + (1 - t) noise``.

    Args:
        scheduler: the times of the steps.
        unet, transformer: the network, one of the two, and None for the other.
            ``network.predict(x, s, t, guidance, **conditions)`` gives diffusers' flow (noise - image), averaged from s
            to t, unless ``diffusion`` says otherwise.
        vae: of a map in the latent space of a VAE: what makes images of its latents, or None.
        text_encoder, tokenizer, projection_model, ...: those of a model of text, or None.
        diffusion: for a map distilled from another model, what the network still speaks. Of a diffusion model
            ``{"prediction_type": "epsilon", "sample" or "v_prediction", "log_ratios": [...]}``, the latter
            log(alpha / sigma) of every step of the schedule, falling, and ``ends_in_noise`` where one more, of noise
            alone, stands behind them; of EDM (arXiv 2206.00364) with ``sigma_data``, ``sigma_min`` and ``sigma_max`` in
            their place; on the cosine schedule with ``right_angle`` and on the straight path with ``timesteps``, that
            of pure noise. ``{"prediction_type": "velocity"}`` is image - noise, by a network whose timesteps run from
            noise to image.
        gamma: the default of a call: 1 for a map that only knows the way to the image (a consistency model).
        guidance: the default of a call's ``guidance_scale``, None for 1.
        shape: of one state, (C, H, W); its sizes are the default of a call's. Of the network's config, if not given.
        needs: the conditions without which the network cannot be called, with commas between. (A list in an index
            means a part of the pipeline to diffusers.)
        id2label: what its classes are called, by number; of several names with commas between, each will do.
        text: ``{"pipeline": NAME}``, the class of diffusers whose ``encode_prompt`` makes the conditions of prompts, by
            the text encoders.
        factor: of a map in the latent space of a VAE: how many pixels a latent is, along each side.
        rate: of a map of sound, states (B, C, L): how many numbers of a waveform are a second.
        shift: how the model's own pipeline moves the times of its steps, the fields of ``Shift``; None for not at all.
        grid: the default of a call's.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->projection_model->unet->transformer->vae"
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
        projection_model: Any,
        diffusion: dict | None = None,
        gamma: float = 0.0,
        guidance: float | None = None,
        shape: list[int] | None = None,
        needs: str | None = None,
        id2label: dict[str, str] | None = None,
        text: dict | None = None,
        factor: int | None = None,
        rate: int | None = None,
        shift: dict | None = None,
        grid: str = "uniform",
    ) -> None:
        super().__init__()
        if unet is None and transformer is None:
            raise ValueError("a FlowMapPipeline is nothing without its network: pass a unet or a transformer")
        one = {"text_encoder": text_encoder, "tokenizer": tokenizer}
        two = {"text_encoder_2": text_encoder_2, "tokenizer_2": tokenizer_2}
        three = {"text_encoder_3": text_encoder_3, "tokenizer_3": tokenizer_3, "projection_model": projection_model}
        self.register_modules(scheduler=scheduler, unet=unet, transformer=transformer, vae=vae, **one, **two, **three)
        config = {"diffusion": diffusion, "gamma": gamma, "guidance": guidance, "shape": shape, "needs": needs}
        self.register_to_config(**config, id2label=id2label, text=text, factor=factor, rate=rate)
        self.register_to_config(shift=shift, grid=grid)
        self._diffusion = diffusion or {}
        # The timestep of pure noise.
        steps = len(self._diffusion.get("log_ratios", [])) + bool(self._diffusion.get("ends_in_noise"))
        angle = self._diffusion.get("right_angle")
        self._last = angle or (steps - 1 if steps else scheduler.config["num_train_timesteps"])
        # The state's channels; behind them an image goes in where more do, and a variance may come out.
        self._channels = shape[0] if shape else state_channels(self.network.config)
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
        audio_start_in_s: float = 0.0,
        audio_end_in_s: float | None = None,
        grid: str | None = None,
        **conditions: Tensor,
    ) -> ImagePipelineOutput | AudioPipelineOutput | tuple:
        """Images in ``num_inference_steps`` network calls.

        Args:
            prompt: for a model of text, one for all images or one for each.
            batch_size: how many; by default as many as there are prompts, latents, images, labels, conditions or
                generators, else one.
            class_labels: for a class-conditional model, by number or name, one for all images or one for each.
            image: for a model that takes one beside the state, (B, C', H, W) with the H and W of the state, in the
                units that it was trained with: [-1, 1] for images.
            height, width: of the images in pixels; by default what the model was made for.
            generator: the source of all noise; a list with one generator an image fixes each image by itself.
            latents: the noise to start from, (B, C, H, W).
            gamma: fresh noise between the steps, from 0 (none: deterministic) to 1 (all: consistency sampling); by
                default what the model was trained for.
            guidance_scale: the strength of guidance, for a model that is told it; it costs no further call. 1 is none,
                and the default if the model has no other.
            grid: where the steps are taken: "uniform", at those of the scheduler, or "native", as the pipeline of the
                model that it was made from, by the size of the images where that does; by default what it was trained
                for.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), the latter two in [0, 1]; or "latent": the state
                as it is. Of videos, states are (B, C, F, H, W), and the others have their frames F behind B. Of sound
                (``.audios``), states are (B, C, L), and all others waveforms (B, C, L) in [-1, 1]: "pt", or arrays.
            audio_start_in_s, audio_end_in_s: of sound, where it begins and ends, in seconds; by default all of it.
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
        grid = self.config["grid"] if grid is None else grid
        if grid not in ("uniform", "native"):
            raise ValueError(f"grid is {grid!r}: it is 'uniform' or 'native'")
        if grid == "native" and not self.config["shift"]:
            raise ValueError("grid is 'native', and the scheduler of this model moves no times: grid='uniform'")
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
        check_image(image, (count, config["in_channels"] // patch_of(config) - self._channels, *shape[2:]))

        longest = shape[-1] * self._factor / self.config["rate"] if self.config["rate"] else None
        seconds = seconds_of(audio_start_in_s, audio_end_in_s, longest)

        device = self._execution_device
        # The state stays in float32, whatever the type of the network.
        x = self._noise(shape, generator, device) if latents is None else latents.to(device, torch.float32)
        cond = self._text(prompt, conditions, count, shape[-2:], seconds)
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
        if grid == "native":
            shift = Shift(**self.config["shift"])
            times = shift.grid(num_inference_steps, shift.tokens(shape[1:])).float()
        for s, t in self.progress_bar(list(pairwise(times))):  # pyright: ignore
            if gamma == 0 or float(t) == 1:
                x = self._map(x, s, t, **cond)
                continue
            # Go on to r, where the noise is sqrt(1 - gamma^2) of that at t beside the image, and bring new noise in.
            r = t / (t + math.sqrt(1 - gamma**2) * (1 - t))
            x = t / r * self._map(x, s, r, **cond) + gamma * (1 - t) * self._noise(shape, generator, device)

        images: Any = x
        if x.ndim == 3:
            images = heard(self.vae, x, seconds, self.config["rate"], output_type)
            self.maybe_free_model_hooks()
            return AudioPipelineOutput(audios=images) if return_dict else (images,)
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
        self, prompt: str | list[str] | None, given: dict[str, Tensor], count: int, sizes: tuple[int, ...], seconds: Any
    ) -> dict[str, Tensor]:
        """The conditions of text: those that are given, and for what is missing those of the prompts, (B, ...)."""
        pipeline, device = self._prompted, self._execution_device
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
            prompts = [prompt] if isinstance(prompt, str) else prompt
            cond |= encode_prompts(pipeline, self.components, prompts, device, seconds)
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
            index[part] = [CARRIED, kind.__name__]
            (folder / part / f"{CARRIED}.py").write_text(whole(inspect.getfile(kind)))
        (folder / self.config_name).write_text(json.dumps(index, indent=2) + "\n")
