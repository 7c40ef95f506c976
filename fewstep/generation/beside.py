"""The images that stand beside a model's samples, from files."""

from pathlib import Path

import torch
from torch import Tensor

from fewstep.data import load_data
from fewstep.flows.signature import Model, image_channels
from fewstep.generation.edits import picture_files, read_pictures


@torch.no_grad()
def images_for(model: Model, path: str | Path, shape: tuple[int, ...]) -> Tensor:
    """The condition ``image`` (n, C', H, W) of what is in a file or a folder, for samples of ``shape`` (C, H, W).

    Pictures come to [-1, 1], cut to their middle and scaled to the sides of the samples. Those of a latent model are
    encoded by its VAE, where it takes as many channels as its latents have. A ``.npy`` or ``.npz`` of floats is taken
    as it is.

    Raises:
        ValueError: a model that takes no image, pictures for one that takes as many channels as none has, an array of
            another shape. FileNotFoundError: nothing is there.
    """
    channels = image_channels(model)
    if not channels:
        raise ValueError(f"--image {path}: this model takes no image beside its samples (recipe key student.image)")
    wanted = (channels, *shape[1:])
    if Path(path).suffix in (".npy", ".npz"):
        data = load_data(path)
        if data.shape != wanted:
            raise ValueError(f"--image {path}: its rows have the shape {data.shape}, and {wanted} is needed")
        return data.rows(torch.arange(data.size or 0), torch.Generator()).data
    latents = model.latents
    is_encoded = latents is not None and channels == shape[0]
    inner = latents.image_shape_of(shape) if latents is not None and is_encoded else wanted
    if inner[0] not in (1, 3):
        raise ValueError(f"--image {path}: this model takes {channels} channels, as no picture has: give them as .npy")
    pixels, _ = read_pictures(picture_files([path]), inner)
    images = torch.from_numpy(pixels).float().sub_(127.5).div_(127.5)
    return latents.encode(images) if latents is not None and is_encoded else images
