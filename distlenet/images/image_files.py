"""Read image files as samples like those of the training set."""

from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from distlenet.images.decoding import GREY, IMAGE_SUFFIXES, MAX_PIXELS, UnreadableImage, open_image, resize_image
from distlenet.images.image_format import ImageFormat

MAX_PADDED_PIXELS = 2 * MAX_PIXELS  # of an image that is padded to the proportions of the training images


def read_images(
    names: Sequence[str], invert: str, expected: ImageFormat
) -> tuple[list[np.ndarray], list[Path], list[str]]:
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
                images.append(read_image(path, invert, expected, path))
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
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        elif not path.exists() and any(character in name for character in "*?["):
            matches = Path(path.anchor or ".").glob(str(path.relative_to(path.anchor) if path.anchor else path))
            files = sorted(p for p in matches if p.is_file())
        else:
            files = [path]
    except (OSError, ValueError) as error:  # for example: name too long, directory not readable
        raise UnreadableImage(f"{name[:200]}: {getattr(error, 'strerror', None) or error}") from error
    if not files:
        raise UnreadableImage(f"{name}: contains no image file ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def read_image(file: Path | IO[bytes], invert: str, expected: ImageFormat, name: object) -> np.ndarray:
    """Read an image file as an image of the training set: uint8 (H, W), or (3, H, W) in color.

    ``invert`` is yes, no or auto; auto inverts a grey image with a light border if the training images have dark ones.
    An image of the right size is not resized. Another one is resized as in training if ``data.size`` resized the
    training images; otherwise it is padded to their proportions with the color of its border, and resized. Raise
    UnreadableImage, with the ``name`` of the file, if it cannot be read.
    """
    image = open_image(file, name, expected.channels)
    border = _border_median(np.asarray(image))
    light = expected.channels == GREY and border[0] > 127
    if invert == "yes" or (invert == "auto" and light and expected.dark_border):
        image, border = ImageOps.invert(image), [255 - value for value in border]
    height, width = expected.size
    if expected.resized:
        image = resize_image(image, expected.size)
    elif image.size != (width, height):
        scale = max(image.width / width, image.height / height)  # pixels of the file per pixel of the result
        padded_size = (max(image.width, round(width * scale)), max(image.height, round(height * scale)))
        if padded_size[0] * padded_size[1] > MAX_PADDED_PIXELS:
            raise UnreadableImage(f"{name}: is too long and narrow; crop it")
        padded = Image.new(image.mode, padded_size, border[0] if len(border) == 1 else tuple(border))
        padded.paste(image, ((padded.width - image.width) // 2, (padded.height - image.height) // 2))
        image = padded.resize((width, height), Image.Resampling.BOX if scale >= 1 else Image.Resampling.BICUBIC)
    array = np.array(image)
    return array if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _border_median(pixels: np.ndarray) -> list[int]:
    """Return the median of the border of an image, (H, W) or (H, W, C), per channel."""
    edges = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    border = np.concatenate([edge.reshape(len(edge), -1) for edge in edges])
    return [int(value) for value in np.median(border, axis=0)]
