"""Decode image files: the same way for training and for prediction, within limits, and without external programs."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

GREY, COLOR = 1, 3  # channels of what an image file decodes to
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # not all of Pillow's: some start external programs
MAX_PIXELS = 50_000_000  # checked before decoding: a small file can hold a very large image
MAX_SIDE = 16_384  # pixels; images are padded to squares for a prediction
BLOCK_ROWS = 64
SIZE_LIMITS = f"expected at most {MAX_PIXELS:,}, and {MAX_SIDE:,} per side; scale it down"
GREY_MODES = {"1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L"}


class UnreadableImage(Exception):
    """An image file cannot be read; the text names the file and the reason."""


def open_image(file: Path | IO[bytes], name: object, channels: int | None = None) -> Image.Image:
    """Decode an image to mode L or RGB, for ``channels`` 1 or 3; None: as stored. EXIF orientation is applied.

    Raise UnreadableImage, with the ``name`` of the image, if it cannot be decoded.
    """
    if isinstance(file, Path) and file.exists() and not file.is_file():  # reading a pipe would block
        raise UnreadableImage(f"{name}: is not a regular file")
    try:
        with Image.open(file, formats=FORMATS) as image:
            _check_size(image, name)
            image.load()
            with contextlib.suppress(Exception):  # damaged EXIF, for which Pillow raises many types
                ImageOps.exif_transpose(image, in_place=True)
            return convert(image, channels or channels_of(image))
    except FileNotFoundError as error:
        raise UnreadableImage(f"{name}: no such file") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"{name}: has too many pixels; {SIZE_LIMITS}") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise UnreadableImage(f"{name}: is not a readable image: {' '.join(str(error).split())[:200]}") from error


def _check_size(image: Image.Image, name: object) -> None:
    if max(image.size) > MAX_SIDE or image.width * image.height > MAX_PIXELS:
        raise UnreadableImage(f"{name}: has {image.width} × {image.height} pixels; {SIZE_LIMITS}")


def is_color(file: Path | IO[bytes]) -> bool:
    """Return whether an image is in color, from its header; False if that is unreadable: decoding reports it."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            return channels_of(image) == COLOR
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        return False


def channels_of(image: Image.Image) -> int:
    """Return 1 for a grey image, 3 for one with colors or a palette."""
    return GREY if image.mode in GREY_MODES else COLOR


def convert(image: Image.Image, channels: int) -> Image.Image:
    """Convert to mode L or RGB, of 8 bits; transparent pixels become white, or black if the visible ones are light."""
    mode = "L" if channels == GREY else "RGB"
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert(mode)
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, "black" if _is_light(rgba) else "white")
        background.alpha_composite(rgba)
        return background.convert(mode)
    return image if image.mode == mode else image.convert(mode)


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scale values (H, W) of 16 bits, or larger ones, to uint8; values up to 255 stay.

    Raise ValueError for values that are not finite.
    """
    limit = 255.0 if values.max(initial=0) <= 255 else 65535.0
    if not (np.isfinite(values.max(initial=0)) and np.isfinite(values.min(initial=0))):  # NaN is the result of both
        raise ValueError("contains values that are not finite")
    result = np.empty(values.shape, np.uint8)
    for rows in _row_blocks(len(values)):
        result[rows] = values[rows].astype(np.float64).clip(0, limit) * (255 / limit)
    return result


def _is_light(rgba: Image.Image) -> bool:
    """Return whether the mean of the pixels, weighted by their opacity, is above 127."""
    opacity, values = np.asarray(rgba.getchannel("A")), np.asarray(rgba.convert("L"))
    excess = 0
    for rows in _row_blocks(len(values)):
        excess += int((opacity[rows] * (values[rows].astype(np.int64) - 127)).sum())
    return excess > 0


def _row_blocks(height: int) -> Iterator[slice]:
    """Yield slices of rows: 8 bytes per pixel of a whole image could be more memory than a server has."""
    for start in range(0, height, BLOCK_ROWS):
        yield slice(start, start + BLOCK_ROWS)


def resize_image(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize an image of mode L or RGB to ``size``, (height, width), bilinearly, with antialiasing.

    Pillow computes in integers: the result is the same on every processor.
    """
    return image if image.size == size[::-1] else image.resize(size[::-1], Image.Resampling.BILINEAR)
