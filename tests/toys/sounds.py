"""Tiny random twins of pipelines of sound."""

from typing import Any

import diffusers
from diffusers.pipelines.stable_audio import StableAudioProjectionModel

from toys.cosine import cosine_scheduler
from toys.families import T5, made, t5, t5_tokenizer

RATE, LENGTH = 16, 8  # numbers of a waveform a second, and latents of a sample, of four numbers each


def stable_audio_model(**options: Any) -> Any:
    return made(
        diffusers.StableAudioDiTModel, sample_size=LENGTH, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, num_key_value_attention_heads=1, cross_attention_dim=8,
        time_proj_dim=8, global_states_input_dim=32, cross_attention_input_dim=16, **options,
    )  # fmt: skip


def dance(**options: Any) -> Any:
    return diffusers.DanceDiffusionPipeline(unet=dance_model(**options), scheduler=diffusers.IPNDMScheduler())


def dance_model(**options: Any) -> Any:
    """As those of Dance Diffusion: 16 channels beside the signal say the time."""
    return made(
        diffusers.UNet1DModel,
        **{
            "sample_size": 32, "sample_rate": RATE, "in_channels": 2, "out_channels": 2, "extra_in_channels": 16,
            "time_embedding_dim": 16, "block_out_channels": (32, 32),
            "down_block_types": ("DownBlock1DNoSkip", "AttnDownBlock1D"),
            "up_block_types": ("AttnUpBlock1D", "UpBlock1DNoSkip"), **options,
        },
    )  # fmt: skip


def sound_vae() -> Any:
    """Of waveforms 2 x 4 L."""
    return made(
        diffusers.AutoencoderOobleck, encoder_hidden_size=4, downsampling_ratios=[2, 2], decoder_channels=4,
        decoder_input_channels=4, audio_channels=2, channel_multiples=[1, 2], sampling_rate=RATE,
    )  # fmt: skip


def stable_audio() -> Any:
    projection = made(StableAudioProjectionModel, 3, text_encoder_dim=T5, conditioning_dim=16, min_value=0, max_value=4)
    return diffusers.StableAudioPipeline(
        vae=sound_vae(), text_encoder=t5(), projection_model=projection, tokenizer=t5_tokenizer(),
        transformer=stable_audio_model(), scheduler=cosine_scheduler(),
    )  # fmt: skip
