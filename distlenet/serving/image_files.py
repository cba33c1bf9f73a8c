"""Pictures from anywhere, as images of the training set's kind: grey, 28×28, light on dark."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
"""What is taken for a picture in a folder."""

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""What is decoded, whatever a file's name: Pillow knows more, of which some start other programs."""

MOST_PIXELS = 50_000_000
"""A picture of more is refused before it is decoded: a small file can hold a very large one."""

LONGEST = 16_384
"""Pixels of a side: what is not square is made so."""


TOO_LARGE = f"at most {MOST_PIXELS:,} are read, and {LONGEST:,} a side; make it smaller"


class Unreadable(Exception):
    """A file that is no picture; the text says why."""


def find_pictures(names: list[str]) -> list[Path]:
    """Turn files, folders and patterns such as ``a/*.png`` into files, in order; each name gives one at least.

    Raises Unreadable, naming it, for a folder or a pattern in which there is none.
    """
    found: list[Path] = []
    for name in names:
        try:
            found += _find(name)
        except (OSError, ValueError) as error:  # a name too long, a folder that is not to be looked into
            raise Unreadable(f"{name[:200]}: {getattr(error, 'strerror', None) or error}") from error
    return found


def _find(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    elif not path.exists() and any(sign in name for sign in "*?["):
        matching = Path(path.anchor or ".").glob(str(path.relative_to(path.anchor) if path.anchor else path))
        inside = sorted(p for p in matching if p.is_file())
    else:
        inside = [path]
    if not inside:
        raise Unreadable(f"{name}: holds no picture ({', '.join(sorted(SUFFIXES))})")
    return inside


def read_picture(path: Path, invert: str, size: int) -> Tensor:
    """Read a picture of any size and colour as uint8 (``size``, ``size``), light on dark as in the training set.

    What is not square is padded with its border's colour. ``invert`` is yes, no or auto: auto turns light and dark
    round where the border is lighter than the middle of its range. A picture that is already grey and of that size,
    with a dark border, comes as it is, to the bit. Raises Unreadable.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for, for ever
        raise Unreadable(f"{path}: is not a regular file")
    try:
        with Image.open(path, formats=FORMATS) as file:
            if max(file.size) > LONGEST or file.width * file.height > MOST_PIXELS:
                raise Unreadable(f"{path}: has {file.width} × {file.height} pixels; {TOO_LARGE}")
            grey = _grey(ImageOps.exif_transpose(file) or file)
    except Unreadable:
        raise
    except FileNotFoundError as error:
        raise Unreadable(f"{path}: no such file") from error
    except Image.DecompressionBombError as error:
        raise Unreadable(f"{path}: has too many pixels; {TOO_LARGE}") from error
    except (OSError, ValueError, SyntaxError, EOFError, UnidentifiedImageError) as error:
        raise Unreadable(f"{path}: cannot be read as a picture: {' '.join(str(error).split())[:200]}") from error
    border = _border(np.asarray(grey))
    if invert == "yes" or (invert == "auto" and border > 127):
        grey, border = ImageOps.invert(grey), 255 - border
    if grey.size != (size, size):
        longest = max(grey.size)
        square = Image.new("L", (longest, longest), border)
        square.paste(grey, ((longest - grey.width) // 2, (longest - grey.height) // 2))
        grey = square.resize((size, size), Image.Resampling.BOX if longest >= size else Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(grey))


def _grey(picture: Image.Image) -> Image.Image:
    """Make a picture grey, 8 bits a pixel. Behind what is transparent comes white, or black behind what is light."""
    if picture.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        values = np.asarray(picture, dtype=np.float64)
        top = 255.0 if values.max(initial=0) <= 255 else 65535.0
        return Image.fromarray((values.clip(0, top) * (255 / top)).astype(np.uint8))
    if "A" in picture.getbands() or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        opacity, values = np.asarray(layer.getchannel("A"), dtype=np.float64), np.asarray(layer.convert("L"))
        is_light = opacity.sum() > 0 and np.average(values, weights=opacity) > 127
        ground = Image.new("RGBA", layer.size, "black" if is_light else "white")
        return Image.alpha_composite(ground, layer).convert("L")
    return picture.convert("L")


def _border(pixels: np.ndarray) -> int:
    """Return the median of the outermost pixels."""
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return int(np.median(edge))
