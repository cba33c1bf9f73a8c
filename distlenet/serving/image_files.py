"""Read image files as samples like those of the training set: grey, square, light on dark."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}  # read in a directory
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # not all of Pillow's: some start external programs
MAX_PIXELS = 50_000_000  # checked before decoding: a small file can hold a very large image
MAX_SIDE = 16_384  # pixels; images are padded to squares
SIZE_LIMITS = f"expected at most {MAX_PIXELS:,}, and {MAX_SIDE:,} per side; scale it down"


class UnreadableImage(Exception):
    """An image file cannot be read; the text names the file and the reason."""


def read_images(names: Sequence[str], invert: str, size: int) -> tuple[list[Tensor], list[Path], list[str]]:
    """Read all image files of ``names``; return the images, their paths, and one message per failure."""
    images, paths, failures = [], [], []
    for name in names:
        try:
            candidates = find_image_files(name)
        except UnreadableImage as error:
            failures.append(str(error))
            continue
        for path in candidates:
            try:
                images.append(read_image(path, invert, size))
                paths.append(path)
            except UnreadableImage as error:
                failures.append(str(error))
    return images, paths, failures


def find_image_files(name: str) -> list[Path]:
    """Return the files of a path, directory or pattern such as ``a/*.png``, sorted.

    Raise UnreadableImage if a directory or pattern contains no image file.
    """
    path = Path(name)
    try:
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        elif not path.exists() and any(character in name for character in "*?["):
            matches = Path(path.anchor or ".").glob(str(path.relative_to(path.anchor) if path.anchor else path))
            files = sorted(p for p in matches if p.is_file())
        else:
            files = [path]
    except (OSError, ValueError) as error:  # for example: name too long, directory not readable
        raise UnreadableImage(f"{name[:200]}: {getattr(error, 'strerror', None) or error}") from error
    if not files:
        raise UnreadableImage(f"{name}: contains no image file ({', '.join(sorted(SUFFIXES))})")
    return files


def read_image(path: Path, invert: str, size: int) -> Tensor:
    """Read an image file as uint8 (``size``, ``size``).

    ``invert`` is yes, no or auto; auto inverts an image whose border is light. A grey image of that size with a dark
    border is returned unchanged. Raise UnreadableImage if the file cannot be read.
    """
    if path.exists() and not path.is_file():  # reading a pipe would block
        raise UnreadableImage(f"{path}: is not a regular file")
    try:
        with Image.open(path, formats=FORMATS) as file:
            if max(file.size) > MAX_SIDE or file.width * file.height > MAX_PIXELS:
                raise UnreadableImage(f"{path}: has {file.width} × {file.height} pixels; {SIZE_LIMITS}")
            image = _to_grey(ImageOps.exif_transpose(file) or file)
    except FileNotFoundError as error:
        raise UnreadableImage(f"{path}: no such file") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"{path}: has too many pixels; {SIZE_LIMITS}") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise UnreadableImage(f"{path}: is not a readable image: {' '.join(str(error).split())[:200]}") from error
    border = _border_median(np.asarray(image))
    if invert == "yes" or (invert == "auto" and border > 127):
        image, border = ImageOps.invert(image), 255 - border
    if image.size != (size, size):
        side = max(image.size)
        square = Image.new("L", (side, side), border)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square.resize((size, size), Image.Resampling.BOX if side >= size else Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image))


def _to_grey(image: Image.Image) -> Image.Image:
    """Convert to 8-bit grey; transparent pixels become white, or black if the visible ones are light."""
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        values = np.asarray(image, dtype=np.float64)
        limit = 255.0 if values.max(initial=0) <= 255 else 65535.0
        return Image.fromarray((values.clip(0, limit) * (255 / limit)).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        opacity, values = np.asarray(rgba.getchannel("A"), dtype=np.float64), np.asarray(rgba.convert("L"))
        is_light = opacity.sum() > 0 and np.average(values, weights=opacity) > 127
        background = Image.new("RGBA", rgba.size, "black" if is_light else "white")
        return Image.alpha_composite(background, rgba).convert("L")
    return image.convert("L")


def _border_median(pixels: np.ndarray) -> int:
    return int(np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])))
