"""Tiny random twins of pipelines of videos."""

from typing import Any

import diffusers
import torch

from toys import encoders
from toys.families import made, t5, t5_tokenizer

FLOW = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def wan_model(seed: int = 0) -> Any:
    return made(
        diffusers.WanTransformer3DModel, seed, num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=32, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=128,
    )  # fmt: skip


def wan_vae(**options: Any) -> Any:
    """Of videos 3 x (2 f - 1) x 2 h x 2 w."""
    return made(
        diffusers.AutoencoderKLWan, base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 1.1, 2.0], scale_factor_spatial=2,
        scale_factor_temporal=2, **options,
    )  # fmt: skip


def wan(**options: Any) -> Any:
    """Wan 2.1; or 2.2, with ``transformer_2`` and ``boundary_ratio``, or with ``expand_timesteps``."""
    text: dict[str, Any] = {"tokenizer": t5_tokenizer(), "text_encoder": encoders.umt5()}
    parts = {**text, "vae": wan_vae(), "transformer": wan_model(), "scheduler": FLOW, **options}
    return diffusers.WanPipeline(**parts)


def anyflow() -> Any:
    model = made(
        diffusers.AnyFlowTransformer3DModel, num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=32, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=128,
    )  # fmt: skip
    return diffusers.AnyFlowPipeline(
        tokenizer=t5_tokenizer(), text_encoder=encoders.umt5(), vae=wan_vae(), transformer=model,
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(shift=5.0),
    )  # fmt: skip


def cogvideox_model(seed: int = 0, **options: Any) -> Any:
    return made(
        diffusers.CogVideoXTransformer3DModel, seed,
        **{
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
            "time_embed_dim": 16, "text_embed_dim": 32, "num_layers": 2, "sample_width": 4, "sample_height": 4,
            "sample_frames": 9, **options,
        },
    )  # fmt: skip


def cogvideox(**options: Any) -> Any:
    """With a table of places, as CogVideoX-2b, and the schedule of the published ones."""
    kinds: Any = {"down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4}
    vae = made(
        diffusers.AutoencoderKLCogVideoX, **kinds, block_out_channels=(8, 8, 8, 8), latent_channels=4,
        layers_per_block=1, norm_num_groups=2, scaling_factor=0.7,
    )  # fmt: skip
    return diffusers.CogVideoXPipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5(), vae=vae, transformer=cogvideox_model(**options),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0, clip_sample=False,
            timestep_spacing="trailing",
        ),
    )  # fmt: skip


def ltx() -> Any:
    model = made(
        diffusers.LTXVideoTransformer3DModel, num_attention_heads=2, attention_head_dim=8, in_channels=4,
        out_channels=4, cross_attention_dim=16, caption_channels=32, num_layers=2,
    )  # fmt: skip
    vae = made(  # 32 pixels and 8 frames a latent, as its rotary positions have it
        diffusers.AutoencoderKLLTXVideo, latent_channels=4, block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1), spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False), patch_size=4, patch_size_t=1,
    )  # fmt: skip
    vae.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    vae.latents_std.copy_(torch.tensor([1.5, 0.7, 1.1, 2.0]))
    return diffusers.LTXPipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5(), vae=vae, transformer=model, scheduler=FLOW
    )
