"""Small versions of the images in a batch."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor

SMALLEST_SIDE = 8  # of an image, in pixels: smaller tensors hold something else, such as boxes


def find_images(data: Any, limit: int) -> list[Tensor]:
    """Return the images of the first samples of a batch, each (H, W) or (C, H, W); an empty list if it has none.

    Images are a tensor (n, H, W) or (n, C, H, W), C is 1 or 3, of uint8 or floating point, or a list of such tensors.
    """
    if isinstance(data, Tensor | list):
        images = list(data[:limit]) if isinstance(data, list) or data.dim() else []
        return images if images and all(map(_is_image, images)) else []
    if isinstance(data, tuple | dict):
        parts = data.values() if isinstance(data, dict) else data
        return next((images for part in parts if (images := find_images(part, limit))), [])
    return []


def _is_image(value: Any) -> bool:
    if not isinstance(value, Tensor) or not (value.dtype == torch.uint8 or value.is_floating_point()):
        return False
    shaped = value.dim() == 2 or (value.dim() == 3 and value.shape[0] in (1, 3))
    return shaped and min(value.shape[-2:]) >= SMALLEST_SIDE


def make_thumbnails(images: list[Tensor], largest: int, enlarge: bool = False) -> list[Image.Image]:
    """Return the images with sides of at most ``largest`` pixels. A host sync.

    Floating-point values are scaled for each channel: 0 to 255 is the range of all images. Small images are enlarged
    by an integer factor, if they should be.
    """
    images = [(image if image.dim() == 3 else image.unsqueeze(0)).detach().cpu() for image in images]
    if images[0].dtype != torch.uint8:
        images = [torch.nan_to_num(image.float()) for image in images]
        low = torch.stack([image.amin((1, 2)) for image in images]).amin(0).view(-1, 1, 1)
        high = torch.stack([image.amax((1, 2)) for image in images]).amax(0).view(-1, 1, 1)
        scale = 255 / (high - low).clamp(min=1e-9)
        images = [((image - low) * scale).round().clamp(0, 255).to(torch.uint8) for image in images]
    thumbnails = []
    for image in images:
        pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        thumbnail = Image.fromarray(pixels.contiguous().numpy())
        longest = max(thumbnail.size)
        factor = max(1, largest // longest) if enlarge else 1
        width, height = (max(1, side * factor * largest // max(largest, longest)) for side in thumbnail.size)
        thumbnail = thumbnail.resize((width, height), Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BOX)
        thumbnails.append(thumbnail)
    return thumbnails


def make_sheet(thumbnails: list[Image.Image], columns: int, cell: int, gap: int = 0) -> Image.Image:
    """Return one image with a thumbnail in each cell, row by row."""
    rows, step = -(-len(thumbnails) // columns), cell + gap
    sheet = Image.new(thumbnails[0].mode, (columns * step - gap, rows * step - gap))
    for number, thumbnail in enumerate(thumbnails):
        sheet.paste(thumbnail, (number % columns * step, number // columns * step))
    return sheet
