"""Tiny random twins of diffusers' models, VAEs and text encoders, and whole pipelines of them."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

CLIP, T5, TOKENS = 16, 32, 8  # widths of the text encoders, and how long a prompt is for CLIP

# The class of a model, its options, and the shapes of its conditions for a sample.
_BLOCKS: dict[str, Any] = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8, "norm_num_groups": 4,
}  # fmt: skip
_LAYERS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "sd": ("UNet2DConditionModel", {**_BLOCKS, "cross_attention_dim": CLIP}, {"encoder_hidden_states": (TOKENS, CLIP)}),
    "sdxl": (
        "UNet2DConditionModel",
        {
            **_BLOCKS, "cross_attention_dim": 2 * CLIP, "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + CLIP,
        },
        {"encoder_hidden_states": (TOKENS, 2 * CLIP), "text_embeds": (CLIP,), "time_ids": (6,)},
    ),
    "dit": (
        "DiTTransformer2DModel",
        {**_LAYERS, "in_channels": 4, "out_channels": 8, "sample_size": 8, "num_embeds_ada_norm": 5},
        {"class_labels": ()},
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {
            **_LAYERS, "num_attention_heads": 3, "in_channels": 4, "out_channels": 8, "sample_size": 8,
            "cross_attention_dim": 24, "caption_channels": T5, "use_additional_conditions": True,
        },
        {"encoder_hidden_states": (TOKENS, T5), "resolution": (2,), "aspect_ratio": (1,)},
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            **_LAYERS, "in_channels": 4, "out_channels": 4, "sample_size": 8, "joint_attention_dim": T5,
            "caption_projection_dim": 16, "pooled_projection_dim": 2 * CLIP, "pos_embed_max_size": 8,
        },
        {"encoder_hidden_states": (TOKENS, T5), "pooled_projections": (2 * CLIP,)},
    ),
    "flux": (
        "FluxTransformer2DModel",
        {
            **_LAYERS, "num_layers": 1, "num_single_layers": 1, "in_channels": 16, "joint_attention_dim": T5,
            "pooled_projection_dim": CLIP, "axes_dims_rope": (4, 2, 2),
        },
        {"encoder_hidden_states": (TOKENS, T5), "pooled_projections": (CLIP,)},
    ),
    "flux2": (
        "Flux2Transformer2DModel",
        {
            **_LAYERS, "num_layers": 1, "num_single_layers": 2, "in_channels": 4, "joint_attention_dim": T5,
            "axes_dims_rope": (2, 2, 2, 2), "timestep_guidance_channels": 32, "guidance_embeds": False,
        },
        {"encoder_hidden_states": (TOKENS, T5)},
    ),
    "qwenimage": (
        "QwenImageTransformer2DModel",
        {
            **_LAYERS, "num_layers": 3, "in_channels": 16, "out_channels": 4, "joint_attention_dim": T5,
            "axes_dims_rope": (4, 2, 2),
        },
        {"encoder_hidden_states": (TOKENS, T5), "encoder_hidden_states_mask": (TOKENS,)},
    ),
    "z-image": (
        "ZImageTransformer2DModel",
        {
            "in_channels": 4, "dim": 16, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
            "cap_feat_dim": T5, "axes_dims": (4, 2, 2), "axes_lens": (1024, 64, 64),
        },
        {"encoder_hidden_states": (TOKENS, T5), "encoder_attention_mask": (TOKENS,)},
    ),
    "sana": (
        "SanaTransformer2DModel",
        {
            **_LAYERS, "num_layers": 3, "in_channels": 4, "out_channels": 4, "sample_size": 8, "caption_channels": T5,
            "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16,
        },
        {"encoder_hidden_states": (TOKENS, T5), "encoder_attention_mask": (TOKENS,)},
    ),
    "auraflow": (
        "AuraFlowTransformer2DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 8, "num_mmdit_layers": 2, "num_single_dit_layers": 1,
            "in_channels": 4, "out_channels": 4, "sample_size": 8, "joint_attention_dim": T5,
            "caption_projection_dim": 16, "pos_embed_max_size": 16,
        },
        {"encoder_hidden_states": (TOKENS, T5)},
    ),
    "lumina2": (
        "Lumina2Transformer2DModel",
        {
            "in_channels": 4, "out_channels": 4, "sample_size": 8, "hidden_size": 16, "num_layers": 2,
            "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16,
            "axes_dim_rope": (4, 2, 2), "axes_lens": (512, 64, 64), "cap_feat_dim": T5,
        },
        {"encoder_hidden_states": (TOKENS, T5), "encoder_attention_mask": (TOKENS,)},
    ),
    "chroma": (
        "ChromaTransformer2DModel",
        {
            **_LAYERS, "num_layers": 1, "num_single_layers": 2, "in_channels": 16, "joint_attention_dim": T5,
            "axes_dims_rope": (4, 2, 2), "approximator_num_channels": 16, "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        {"encoder_hidden_states": (TOKENS, T5), "encoder_attention_mask": (TOKENS,)},
    ),
    "hunyuanimage": (
        "HunyuanImageTransformer2DModel",
        {
            **_LAYERS, "num_layers": 1, "num_single_layers": 2, "num_refiner_layers": 1, "in_channels": 4,
            "out_channels": 4, "text_embed_dim": T5, "text_embed_2_dim": CLIP, "rope_axes_dim": (4, 4),
        },
        {
            "encoder_hidden_states": (TOKENS, T5), "encoder_attention_mask": (TOKENS,),
            "encoder_hidden_states_2": (TOKENS, CLIP), "encoder_attention_mask_2": (TOKENS,),
        },
    ),
}  # fmt: skip


def made(make: Callable[..., Any], seed: int = 0, **options: Any) -> Any:
    """A model with random weights of this seed, none of them all zero, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make(**options)
        for weight in model.parameters():  # a head that starts at zero would hide everything behind it
            if not weight.any():
                torch.nn.init.normal_(weight, std=0.1)
    return model.eval()


def tiny_model(name: str, **options: Any) -> Any:
    """A model of diffusers with latents of 4 x 8 x 8."""
    class_name, defaults, _ = MODELS[name]
    return made(getattr(diffusers, class_name), **{**defaults, **options})


def conditions(name: str, rows: int = 2) -> dict[str, Tensor]:
    """Random conditions of a model."""
    generator = torch.Generator().manual_seed(3)
    cond = {key: torch.randn(rows, *shape, generator=generator) for key, shape in MODELS[name][2].items()}
    # Of prompts of other lengths.
    masks = (torch.arange(TOKENS) < torch.tensor([[TOKENS], [3]])).long()[[0, 1] * rows][:rows]
    cond |= {key: masks.clone() for key in cond if "mask" in key}
    return {key: torch.tensor([1, 4])[:rows] if key == "class_labels" else value for key, value in cond.items()}


def tiny_vae(**options: Any) -> AutoencoderKL:
    """Images of 3 x 16 x 16 and latents of 4 x 8 x 8."""
    return made(
        AutoencoderKL,
        **{
            "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4,
            "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
            "sample_size": 16, "scaling_factor": 0.7, **options,
        },
    )  # fmt: skip


def ddim(**options: Any) -> DDIMScheduler:
    """Stable Diffusion's schedule, which DDIM begins at its noisiest step and follows to clean data."""
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        timestep_spacing="trailing", set_alpha_to_one=True, steps_offset=1, **options,
    )  # fmt: skip


def clip(seed: int = 0, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=14, hidden_size=CLIP, intermediate_size=16, projection_dim=CLIP, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=TOKENS, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return made(CLIPTextModelWithProjection if projected else CLIPTextModel, seed, config=config)


def clip_tokenizer() -> Any:
    """Reads and writes the letters a, c, t, d, o, g."""
    from transformers import CLIPTokenizer

    known = ["<|startoftext|>", "<|endoftext|>", *"actdog", *(f"{letter}</w>" for letter in "actdog")]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(known)}, merges=[], model_max_length=TOKENS)


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=8, d_model=T5, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return made(T5EncoderModel, 2, config=config)


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    known = ["<pad>", "</s>", "<unk>", "\u2581", "\u2581a", "\u2581cat", "\u2581dog"]
    return T5Tokenizer(vocab=[(word, -float(i)) for i, word in enumerate(known)], extra_ids=0, model_max_length=TOKENS)


def deep_vae() -> Any:
    """Sana's: images of 3 x 16 x 16 and latents of 4 x 8 x 8."""
    return made(
        diffusers.AutoencoderDC, latent_channels=4, attention_head_dim=4, encoder_block_out_channels=(4, 8),
        decoder_block_out_channels=(4, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()), encoder_block_types="ResBlock",
        decoder_block_types="ResBlock", scaling_factor=0.4,
    )  # fmt: skip


def frame_vae() -> Any:
    """Qwen-Image's, which sees an image as a video of one frame: 3 x 16 x 16 and latents of 4 x 8 x 8."""
    return made(
        diffusers.AutoencoderKLQwenImage, base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1,
        temperal_downsample=[False], latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 1.1, 2.0],
    )  # fmt: skip


def hunyuan_vae() -> Any:
    """HunyuanImage's: images of 3 x 16 x 16 and latents of 4 x 8 x 8."""
    return made(
        diffusers.AutoencoderKLHunyuanImage, in_channels=3, out_channels=3, latent_channels=4,
        block_out_channels=(32, 32), layers_per_block=1, spatial_compression_ratio=2, sample_size=16,
        scaling_factor=0.75, downsample_match_channel=False, upsample_match_channel=False,
    )  # fmt: skip


def patch_vae() -> Any:
    """Flux.2's, 2 x 2 patches of whose latents are those of the model: 3 x 16 x 16 and 4 x 8 x 8."""
    vae = made(
        diffusers.AutoencoderKLFlux2, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        latent_channels=1, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        sample_size=16,
    )  # fmt: skip
    vae.bn.running_mean.copy_(torch.tensor([0.2, -0.1, 0.0, 0.4]))
    vae.bn.running_var.copy_(torch.tensor([1.5, 0.5, 2.0, 1.0]))
    return vae


def tiny_pipeline(name: str) -> Any:
    """A whole pipeline: of a name in MODELS, or "sd3 without" its T5."""
    from toys import encoders

    diffusion: dict[str, Any] = {"vae": tiny_vae(), "scheduler": ddim()}
    flow: dict[str, Any] = {"vae": tiny_vae(shift_factor=0.1), "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}
    one = {"text_encoder": clip(), "tokenizer": clip_tokenizer()}
    two = {"text_encoder_2": clip(1, projected=True), "tokenizer_2": clip_tokenizer()}
    match name:
        case "sd":
            unused: Any = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            return diffusers.StableDiffusionPipeline(unet=tiny_model("sd"), **one, **diffusion, **unused)
        case "sdxl":
            return diffusers.StableDiffusionXLPipeline(
                unet=tiny_model("sdxl"), add_watermarker=False, **one, **two, **diffusion
            )
        case "dit":
            return diffusers.DiTPipeline(transformer=tiny_model("dit"), **diffusion)
        case "pixart":
            return diffusers.PixArtAlphaPipeline(
                transformer=tiny_model("pixart"), text_encoder=t5(), tokenizer=t5_tokenizer(), **diffusion
            )
        case "sd3" | "sd3 without":
            three = {"text_encoder_3": t5(), "tokenizer_3": t5_tokenizer()}
            if name != "sd3":
                three = dict.fromkeys(three)
            one["text_encoder"] = clip(projected=True)
            return diffusers.StableDiffusion3Pipeline(transformer=tiny_model("sd3"), **one, **two, **three, **flow)
        case "chroma":
            return diffusers.ChromaPipeline(
                transformer=tiny_model(name), text_encoder=t5(), tokenizer=t5_tokenizer(), **flow
            )
        case "auraflow":
            return diffusers.AuraFlowPipeline(
                transformer=tiny_model(name),
                text_encoder=encoders.umt5(),
                tokenizer=t5_tokenizer(),
                vae=tiny_vae(),
                scheduler=flow["scheduler"],
            )
        case "sana" | "lumina2":
            kind: Any = diffusers.SanaPipeline if name == "sana" else diffusers.Lumina2Pipeline
            flow["vae"] = deep_vae() if name == "sana" else flow["vae"]
            return kind(
                transformer=tiny_model(name), text_encoder=encoders.gemma(), tokenizer=encoders.gemma_tokenizer(),
                **flow,
            )  # fmt: skip
        case "z-image":
            return diffusers.ZImagePipeline(
                transformer=tiny_model(name), text_encoder=encoders.qwen3(), tokenizer=encoders.qwen_tokenizer(), **flow
            )
        case "flux2":  # klein, of which some are distilled and some are not
            flow["vae"], width = patch_vae(), 3 * T5  # of three layers of its text encoder
            return diffusers.Flux2KleinPipeline(
                transformer=tiny_model(name, joint_attention_dim=width), text_encoder=encoders.qwen3(causal=True),
                tokenizer=encoders.qwen_tokenizer(), **flow,
            )  # fmt: skip
        case "qwenimage":
            flow["vae"] = frame_vae()
            return diffusers.QwenImagePipeline(
                transformer=tiny_model(name), text_encoder=encoders.qwen_vl(), tokenizer=encoders.qwen_tokenizer(),
                **flow,
            )  # fmt: skip
        case "hunyuanimage":
            from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

            config = T5Config(vocab_size=384, d_model=CLIP, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
            flow["vae"] = hunyuan_vae()
            return diffusers.HunyuanImagePipeline(
                transformer=tiny_model(name), text_encoder=encoders.qwen_vl(), tokenizer=encoders.qwen_tokenizer(),
                text_encoder_2=made(T5EncoderModel, 6, config=config), tokenizer_2=ByT5Tokenizer(), **flow,
            )  # fmt: skip
        case _:
            second = {"text_encoder_2": t5(), "tokenizer_2": t5_tokenizer()}
            return diffusers.FluxPipeline(transformer=tiny_model("flux"), **one, **second, **flow)
