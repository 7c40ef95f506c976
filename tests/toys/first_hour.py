"""What a stranger brings in the first hour: a folder of photographs as cameras and scanners leave them, and a small
model that diffusers itself wrote."""

from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

# Portrait and landscape, thin, small and large: (name, width, height, mode).
_PHOTOS = (
    ("thin.png", 31, 200, "RGB"),
    ("wide.jpg", 200, 31, "RGB"),
    ("IMG_0001.JPG", 4000, 3000, "RGB"),
    ("grey scan.jpeg", 640, 480, "L"),
    ("icon.png", 300, 300, "RGBA"),
    ("more/ü (1).webp", 50, 70, "RGB"),
    ("more/tiny.png", 8, 8, "RGB"),
    ("trip/b.jpg", 90, 60, "RGB"),
)


def write_photos(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name, width, height, mode in _PHOTOS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        colours = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        colours.resize((width, height)).convert(mode).save(folder / name)
    turned = Image.Exif()
    turned[274] = 6  # on its side, as a telephone is held
    colours.resize((40, 30)).save(folder / "turned.jpg", exif=turned)
    (folder / "Thumbs.db").write_bytes(b"x")
    (folder / ".DS_Store").write_bytes(b"x")


def write_ddpm(folder: Path, channels: int = 3, size: int = 16) -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=size, in_channels=channels, out_channels=channels, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
