"""Tiny random twins of published diffusers folders: their classes, schedulers and the odd keys of their configs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from torch import Tensor

from toys.families import MODELS, made, tiny_model, tiny_vae
from toys.sounds import dance_model

Call = Callable[[Any, Tensor, Tensor, dict[str, Tensor]], Tensor]

_SD: dict[str, Any] = MODELS["sd"][1]
_PIXELS: dict[str, Any] = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "layers_per_block": 1,
    "norm_num_groups": 4, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8,
}  # fmt: skip
_SCALED: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def edit(file: Path, drop: tuple[str, ...] = (), **values: Any) -> None:
    """Change keys of a JSON file, and leave some out."""
    said = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({key: value for key, value in said.items() if key not in drop}))


def write(
    folder: Path,
    pipeline: Any,
    model: ModelMixin,
    scheduler: dict[str, Any],
    vae: ModelMixin | None = None,
    place: str = "",
    others: dict[str, Any] | None = None,
) -> Path:
    """A folder with a model, the scheduler's config as it is said and the VAE, and an index of them."""
    part = "unet" if "UNet" in type(model).__name__ else "transformer"
    model.save_pretrained(folder / part)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {part: ["diffusers", type(model).__name__], "scheduler": ["diffusers", scheduler["_class_name"]]}
    if vae is not None:
        place = place or "vae"
        vae.save_pretrained(folder / place)
        index[place] = ["diffusers", type(vae).__name__]
    version = {"_class_name": pipeline, "_diffusers_version": "0.21.0"}
    (folder / "model_index.json").write_text(json.dumps({**version, **index, **(others or {})}))
    return folder


def unet(**options: Any) -> Any:
    """A ``UNet2DModel`` on 3 x 8 x 8."""
    return made(diffusers.UNet2DModel, **{**_PIXELS, **options})


def conditional(**options: Any) -> Any:
    """A ``UNet2DConditionModel`` on 4 x 8 x 8."""
    return tiny_model("sd", **options)


def wan(seed: int = 0, **options: Any) -> Any:
    """A ``WanTransformer3DModel`` on 4 x 2 x 8 x 8."""
    small = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "ffn_dim": 16, "freq_dim": 16}
    return made(
        diffusers.WanTransformer3DModel,
        seed,
        **{**small, "in_channels": 4, "out_channels": 4, "text_dim": 16, **options},
    )


def wan_experts(
    folder: Path, other: dict[str, Any] | None = None, pipeline: str = "WanPipeline", boundary_ratio: Any = 0.02,
    in_channels: int = 4,
) -> Path:  # fmt: skip
    """A folder of Wan 2.2 with both of its experts, and the keys that the published configs have."""
    odd = {"qk_norm": "rms_norm_across_heads", "added_kv_proj_dim": None, "pos_embed_seq_len": None}
    two = {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": boundary_ratio}
    models = [wan(in_channels=in_channels, seed=seed, **odd, **more) for seed, more in ((0, {}), (1, other or {}))]
    models[1].save_pretrained(folder / "transformer_2")
    return write(folder, pipeline, models[0], UNIPC, wan_vae(), others=two)


def by_expert(model: Any, x: Tensor, k: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """As ``WanPipeline`` calls them, each at its own times."""
    index = json.loads((model.place / "model_index.json").read_text())
    other = diffusers.WanTransformer3DModel.from_pretrained(model.place / "transformer_2").eval()
    one_at = [other if time < 1000 * index["boundary_ratio"] else model for time in k]
    some = [{key: value[n : n + 1] for key, value in cond.items()} for n in range(len(k))]
    return torch.cat([transformer(m, x[n : n + 1], k[n : n + 1], some[n]) for n, m in enumerate(one_at)])


def wan_vae() -> Any:
    """Of videos 3 x (4 f - 3) x 64 x 64, with the keys of Wan 2.1's: no ``latent_channels``."""
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 0.5, 1.5]}
    return made(diffusers.AutoencoderKLWan, base_dim=4, z_dim=4, num_res_blocks=1, **statistics)


def movq() -> Any:
    """Kandinsky's VAE."""
    blocks: Any = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes: Any = {"block_out_channels": (32, 32), "layers_per_block": 1, "num_vq_embeddings": 16}
    return made(diffusers.VQModel, latent_channels=4, vq_embed_dim=4, norm_type="spatial", **blocks, **sizes)


def vqvae() -> Any:
    """That of the first latent diffusion models."""
    blocks: Any = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes: Any = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "num_vq_embeddings": 16}
    return made(diffusers.VQModel, latent_channels=3, vq_embed_dim=3, **blocks, **sizes)


# Schedulers as they are published.
DDPM = {"_class_name": "DDPMScheduler", "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
DDPM |= {"num_train_timesteps": 1000, "trained_betas": None, "variance_type": "fixed_small", "clip_sample": True}
IPNDM = {"_class_name": "IPNDMScheduler", "num_train_timesteps": 1000, "trained_betas": None}
PNDM = {"_class_name": "PNDMScheduler", **_SCALED, "num_train_timesteps": 1000, "set_alpha_to_one": False}
PNDM |= {"skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False}
DDIM_V = {**PNDM, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
EULER = {**PNDM, "_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "use_karras_sigmas": False}
EULER |= {"timestep_spacing": "leading", "prediction_type": "epsilon", "sample_max_value": 1.0}
IF = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range"}
IF |= {"thresholding": True, "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5, "prediction_type": "epsilon"}
UNIPC = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True}
UNIPC |= {"flow_shift": 3.0, "num_train_timesteps": 1000}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000}


def labelled(model: Any, x: Tensor, k: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """What the pipelines of U-Nets call: the image behind the state."""
    others = {name: value for name, value in cond.items() if name in ("class_labels",)}
    added = {name: cond[name] for name in ("text_embeds", "time_ids", "image_embeds") if name in cond}
    text = (cond.get("encoder_hidden_states"),) if "Condition" in type(model).__name__ else ()
    more = {"added_cond_kwargs": added or None} if text else {}
    state = torch.cat([x, cond["image"]], dim=1) if "image" in cond else x
    return model(state, k, *text, **others, **more).sample[:, : x.shape[1]]


def signal(model: Any, x: Tensor, k: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """What ``DanceDiffusionPipeline`` calls."""
    return model(x, k).sample


def image_first(model: Any, x: Tensor, k: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """As ``MarigoldDepthPipeline`` writes it."""
    state = torch.cat([cond["image"], x], dim=1)
    return model(state, k, cond["encoder_hidden_states"], class_labels=cond.get("class_labels")).sample


def transformer(model: Any, x: Tensor, k: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """What the pipelines of transformers call, by the names of the arguments."""
    sizes = {name: cond[name] for name in ("resolution", "aspect_ratio") if name in cond}
    others = {name: value for name, value in cond.items() if name not in (*sizes, "image")}
    added = {"added_cond_kwargs": sizes or {"resolution": None, "aspect_ratio": None}}
    state = torch.cat([x, cond["image"]], dim=1) if "image" in cond else x
    return model(state, timestep=k, **others, **(added if "PixArt" in type(model).__name__ else {})).sample[
        :, : x.shape[1]
    ]


def flux(model: Any, x: Tensor, k: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """As ``FluxFillPipeline`` writes it: the image's patches behind those of the state."""
    pipe: Any = diffusers.FluxPipeline
    both = [pipe._pack_latents(part, *part.shape) for part in (x, cond["image"])]
    told = {name: cond[name] for name in ("encoder_hidden_states", "pooled_projections")}
    ids = pipe._prepare_latent_image_ids(len(x), x.shape[2] // 2, x.shape[3] // 2, x.device, x.dtype)
    texts = torch.zeros(told["encoder_hidden_states"].shape[1], 3)
    found = model(torch.cat(both, dim=2), timestep=k / 1000, img_ids=ids, txt_ids=texts, **told).sample
    return pipe._unpack_latents(found, 8 * x.shape[2], 8 * x.shape[3], 8)


def _sdxl(**options: Any) -> Any:
    return tiny_model("sdxl", **options)


# What loads: how it is written, and the call of its pipeline.
LOADED: dict[str, tuple[Callable[[Path], Path], Call]] = {
    "stable-diffusion 1.5": (
        lambda f: write(f, "StableDiffusionPipeline", conditional(center_input_sample=False), PNDM, tiny_vae()),
        labelled,
    ),
    "stable-diffusion 2.1, v": (
        lambda f: write(
            f,
            "StableDiffusionPipeline",
            conditional(attention_head_dim=[4, 8], use_linear_projection=True),
            DDIM_V,
            tiny_vae(),
        ),
        labelled,
    ),
    "stable-diffusion inpainting": (
        lambda f: write(f, "StableDiffusionInpaintPipeline", conditional(in_channels=9), PNDM, tiny_vae()),
        labelled,
    ),
    "stable-diffusion 2 depth": (
        lambda f: write(f, "StableDiffusionDepth2ImgPipeline", conditional(in_channels=5), PNDM, tiny_vae()),
        labelled,
    ),
    "stable-diffusion x4 upscaler": (
        lambda f: write(
            f, "StableDiffusionUpscalePipeline", conditional(in_channels=7, num_class_embeds=20), DDIM_V, tiny_vae()
        ),
        labelled,
    ),
    "instruct-pix2pix": (
        lambda f: write(f, "StableDiffusionInstructPix2PixPipeline", conditional(in_channels=8), EULER, tiny_vae()),
        labelled,
    ),
    "stable-diffusion 2.1 unclip": (
        lambda f: write(
            f,
            "StableUnCLIPPipeline",
            conditional(class_embed_type="projection", projection_class_embeddings_input_dim=12),
            DDIM_V,
            tiny_vae(),
        ),
        labelled,
    ),
    "marigold": (
        lambda f: write(
            f, "MarigoldDepthPipeline", conditional(in_channels=8), {**DDIM_V, "steps_offset": 1}, tiny_vae()
        ),
        image_first,
    ),
    "geowizard": (
        lambda f: write(
            f,
            ["depth_normal_pipeline", "DepthNormalEstimationPipeline"],
            conditional(in_channels=8, class_embed_type="projection", projection_class_embeddings_input_dim=10),
            DDIM_V,
            tiny_vae(),
        ),
        image_first,
    ),
    "sdxl base": (lambda f: write(f, "StableDiffusionXLPipeline", _sdxl(), EULER, tiny_vae()), labelled),
    "sdxl refiner": (
        lambda f: write(
            f,
            "StableDiffusionXLImg2ImgPipeline",
            _sdxl(cross_attention_dim=16),
            EULER,
            tiny_vae(),
            others={"requires_aesthetics_score": True, "text_encoder": [None, None], "tokenizer": [None, None]},
        ),
        labelled,
    ),
    "deepfloyd IF-I": (
        lambda f: write(
            f,
            "IFPipeline",
            conditional(
                in_channels=3,
                out_channels=6,
                encoder_hid_dim=24,
                encoder_hid_dim_type="text_proj",
                addition_embed_type="text",
                addition_embed_type_num_heads=4,
                act_fn="gelu",
                resnet_time_scale_shift="scale_shift",
            ),
            IF,
        ),
        labelled,
    ),
    "deepfloyd IF-II": (
        lambda f: write(
            f,
            "IFSuperResolutionPipeline",
            conditional(
                in_channels=6,
                out_channels=6,
                encoder_hid_dim=24,
                addition_embed_type="text",
                addition_embed_type_num_heads=4,
                class_embed_type="timestep",
            ),
            IF,
        ),
        labelled,
    ),
    "kandinsky 2.2": (
        lambda f: write(
            f,
            "KandinskyV22Pipeline",
            conditional(
                out_channels=8, encoder_hid_dim=20, encoder_hid_dim_type="image_proj", addition_embed_type="image"
            ),
            {**IF, "beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012},
            movq(),
            "movq",
        ),
        labelled,
    ),
    "kandinsky 2.2 inpainting": (
        lambda f: write(
            f,
            "KandinskyV22InpaintPipeline",
            conditional(
                in_channels=9,
                out_channels=8,
                encoder_hid_dim=20,
                encoder_hid_dim_type="image_proj",
                addition_embed_type="image",
            ),
            {**IF, "beta_schedule": "linear"},
            movq(),
            "movq",
        ),
        labelled,
    ),
    "google/ddpm": (
        lambda f: write(f, "DDPMPipeline", unet(downsample_padding=0, flip_sin_to_cos=False, freq_shift=1), DDPM),
        labelled,
    ),
    "ddpm of diffusers 0.0.4": (
        lambda f: write(
            f,
            "DDPMPipeline",
            unet(),
            {
                "_class_name": "DDPMScheduler",
                "timesteps": 100,
                "beta_end": 0.2,
                "tensor_format": "pt",
                "clip_sample": True,
                "timestep_values": None,
            },
        ),
        labelled,
    ),
    "ddpm that predicts the data": (
        lambda f: write(f, "DDPMPipeline", unet(), {**DDPM, "predict_epsilon": False, "clip_sample": False}),
        labelled,
    ),
    "ddpm with trained betas": (
        lambda f: write(
            f,
            "DDPMPipeline",
            unet(),
            {**DDPM, "num_train_timesteps": 50, "trained_betas": torch.linspace(1e-3, 0.2, 50).tolist()},
        ),
        labelled,
    ),
    "ddpm of oblong samples": (lambda f: write(f, "DDPMPipeline", unet(sample_size=(8, 12)), DDPM), labelled),
    "ddpm of any size": (lambda f: write(f, "DDPMPipeline", unet(sample_size=None), DDPM), labelled),
    "ddpm told vectors": (lambda f: write(f, "DDPMPipeline", unet(class_embed_type="identity"), DDPM), labelled),
    "dance diffusion": (lambda f: write(f, "DanceDiffusionPipeline", dance_model(), IPNDM), signal),
    "a planner of trajectories": (
        lambda f: write(
            f,
            "ValueGuidedRLPipeline",
            dance_model(
                in_channels=6,
                out_channels=6,
                extra_in_channels=0,
                time_embedding_dim=None,
                sample_rate=None,
                down_block_types=("DownResnetBlock1D",) * 2,
                up_block_types=("UpResnetBlock1D",),
                mid_block_type="MidResTemporalBlock1D",
                out_block_type="OutConv1DBlock",
                act_fn="mish",
                freq_shift=1,
                use_timestep_embedding=True,
                time_embedding_type="positional",
                flip_sin_to_cos=False,
            ),
            {**DDPM, "prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2", "clip_sample": False},
        ),
        signal,
    ),
    "ldm-celebahq-256": (
        lambda f: write(
            f,
            "LDMPipeline",
            unet(),
            {
                "_class_name": "DDIMScheduler",
                **_SCALED,
                "timesteps": 500,
                "beta_start": 0.0015,
                "clip_sample": False,
                "timestep_values": None,
                "tensor_format": "pt",
            },
            vqvae(),
            "vqvae",
        ),
        labelled,
    ),
    "ldm super-resolution": (
        lambda f: write(
            f,
            "LDMSuperResolutionPipeline",
            unet(in_channels=6),
            {**PNDM, "_class_name": "DDIMScheduler"},
            vqvae(),
            "vqvae",
        ),
        labelled,
    ),
    "DiT": (
        lambda f: write(
            f,
            "DiTPipeline",
            tiny_model("dit"),
            {**DDPM, "_class_name": "DDIMScheduler"},
            tiny_vae(),
            others={"id2label": {"0": "tench, Tinca tinca", "4": "hammerhead"}},
        ),
        transformer,
    ),
    "PixArt alpha": (
        lambda f: write(
            f,
            "PixArtAlphaPipeline",
            tiny_model("pixart"),
            {**DDPM, "_class_name": "DPMSolverMultistepScheduler"},
            tiny_vae(),
        ),
        transformer,
    ),
    "PixArt sigma": (
        lambda f: write(
            f,
            "PixArtSigmaPipeline",
            tiny_model("pixart", use_additional_conditions=False, interpolation_scale=2),
            {**DDPM, "_class_name": "DPMSolverMultistepScheduler"},
            tiny_vae(),
        ),
        transformer,
    ),
    "stable-diffusion 3": (
        lambda f: write(f, "StableDiffusion3Pipeline", tiny_model("sd3"), FLOW, tiny_vae(shift_factor=0.0609)),
        transformer,
    ),
    "Wan 2.1": (lambda f: write(f, "WanPipeline", wan(), UNIPC, wan_vae()), transformer),
    "Wan 2.2": (wan_experts, by_expert),
    "Wan 2.2 from images": (
        lambda f: wan_experts(f, in_channels=9, pipeline="WanImageToVideoPipeline"),
        by_expert,
    ),
    "Wan 2.2 of one expert": (
        lambda f: write(
            f,
            "WanPipeline",
            wan(),
            UNIPC,
            wan_vae(),
            others={"transformer_2": [None, None], "boundary_ratio": None, "expand_timesteps": True},
        ),
        transformer,
    ),
    "Wan 2.1 from images": (
        lambda f: write(f, "WanImageToVideoPipeline", wan(in_channels=9, image_dim=8), UNIPC, wan_vae()),
        transformer,
    ),
    "flux fill": (
        lambda f: write(f, "FluxFillPipeline", tiny_model("flux", in_channels=48, out_channels=16), FLOW, tiny_vae()),
        flux,
    ),
}

# What is refused, and what is said.
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "Wan 2.2 without its second": (
        lambda f: write(
            f,
            "WanPipeline",
            wan(),
            UNIPC,
            wan_vae(),
            others={"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875},
        ),
        r"WanPipeline in .* samples with transformer_2 too, .* fetch it.*copy transformer/ and scheduler/ to a folder",
    ),
    "Wan 2.2 without its boundary": (
        lambda f: wan_experts(f, boundary_ratio=None),
        r"WanPipeline in .* has a transformer_2, and its boundary_ratio is None: say in model_index.json where",
    ),
    "Wan 2.2 of two shapes": (
        lambda f: wan_experts(f, {"ffn_dim": 32}),
        "the ffn_dim of transformer and transformer_2 are 16 and 32: experts are of one shape",
    ),
    "controlnet": (
        lambda f: write(
            f,
            "StableDiffusionControlNetPipeline",
            conditional(),
            PNDM,
            tiny_vae(),
            others={"controlnet": ["diffusers", "ControlNetModel"]},
        ),
        r"StableDiffusionControlNetPipeline in .* samples with controlnet too",
    ),
    "kandinsky 2.2 controlnet": (
        lambda f: write(
            f,
            "KandinskyV22ControlnetPipeline",
            conditional(
                in_channels=8,
                out_channels=8,
                encoder_hid_dim=20,
                encoder_hid_dim_type="image_proj",
                addition_embed_type="image_hint",
            ),
            {**IF, "beta_schedule": "linear"},
            movq(),
            "movq",
        ),
        r"UNet2DConditionModel in .* cannot be called",
    ),
    "score-sde VE": (
        lambda f: write(
            f,
            "ScoreSdeVePipeline",
            unet(time_embedding_type="fourier"),
            {"_class_name": "ScoreSdeVeScheduler", "sigma_max": 1348.0},
        ),
        r"has a fourier time embedding",
    ),
    "score-sde VP": (
        lambda f: write(f, "ScoreSdeVpPipeline", unet(), {"_class_name": "ScoreSdeVpScheduler"}),
        r"is a ScoreSdeVpScheduler, which diffusers does not have",
    ),
    "karras VE": (
        lambda f: write(f, "KarrasVePipeline", unet(), {"_class_name": "KarrasVeScheduler"}),
        r"KarrasVeScheduler has no alphas_cumprod",
    ),
    "consistency model": (
        lambda f: write(
            f, "ConsistencyModelPipeline", unet(num_class_embeds=10), {"_class_name": "CMStochasticIterativeScheduler"}
        ),
        r"CMStochasticIterativeScheduler has no alphas_cumprod",
    ),
    "dance diffusion without room for its time": (
        lambda f: write(
            f, "DanceDiffusionPipeline", dance_model(extra_in_channels=0, block_out_channels=(64, 64)), IPNDM
        ),
        r"the UNet1DModel in .*unet cannot be called, which its config asks for",
    ),
    "the first class of all": (
        lambda f: _renamed(write(f, "DDPM", unet(), DDPM), "UNetUnconditionalModel"),
        r"is a UNetUnconditionalModel, and fewstep.load knows",
    ),
    "a size that the levels do not halve": (
        lambda f: write(f, "DDPMPipeline", unet(sample_size=15), DDPM),
        r"its samples are 15 x 15, and it takes sides that are multiples of 2",
    ),
    "cogview": (
        lambda f: _renamed(
            write(f, "CogView4Pipeline", tiny_model("dit"), FLOW), "CogView4Transformer2DModel", "transformer"
        ),
        r"is a CogView4Transformer2DModel, and fewstep.load knows",
    ),
    "stable cascade": (
        lambda f: _moved(write(f, "StableCascadeDecoderPipeline", unet(), DDPM), "decoder"),
        r"no model in .*StableCascadeDecoderPipeline has unet, scheduler, decoder",
    ),
}


def _renamed(folder: Path, name: str, part: str = "unet") -> Path:
    edit(folder / part / "config.json", _class_name=name)
    return folder


def _moved(folder: Path, name: str) -> Path:
    (folder / "unet").rename(folder / name)
    edit(folder / "model_index.json", **{name: ["diffusers", "StableCascadeUNet"]})
    return folder
