"""Waveforms on disk, as .wav files of 16 bits."""

import io
import wave
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fewstep.common.disk import replace_file

_LARGEST = 32767


def save_sounds(sounds: Tensor, rate: int, files: Sequence[Path]) -> None:
    """Waveforms (N, C, L) in [-1, 1] as .wav files, each whole or absent; numbers beyond are cut off.

    Args:
        rate: how many numbers of a waveform are a second.
    """
    numbers = sounds.float().clamp(-1, 1).mul(_LARGEST).round().short().transpose(1, 2)  # channels side by side
    for sound, file in zip(numbers, files, strict=True):
        content = io.BytesIO()
        with wave.open(content, "wb") as written:
            written.setnchannels(sound.shape[1])
            written.setsampwidth(2)
            written.setframerate(rate)
            written.writeframes(sound.contiguous().numpy().astype("<i2").tobytes())
        replace_file(file, content.getvalue())
