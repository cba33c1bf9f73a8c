"""What the images of a network are like: a prediction needs it to read an image file."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from distlenet.images.decoding import GREY, MAX_SIDE


@dataclass(frozen=True)
class ImageFormat:
    """Shape and statistics of the training images."""

    channels: int
    size: tuple[int, int]  # height and width, in pixels
    resized: bool  # by data.size
    mean: tuple[float, ...]  # per channel
    std: tuple[float, ...]
    low: float  # the smallest and the largest value, for floating-point images; 0 and 255 for uint8
    high: float
    dark_border: bool  # nearly all images are grey with a dark border: a light one is inverted for a prediction

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "ImageFormat":
        """Return the format that ``to_dict`` wrote, also in its first version: grey, square, with a dark border.

        Raise LookupError, TypeError or ValueError if a value is missing or invalid.
        """
        if isinstance(state["mean"], float):
            state = {**state, "mean": [state["mean"]], "std": [state["std"]], "size": [state["size"]] * 2}
            state |= {"channels": GREY, "resized": False, "low": 0.0, "high": 255.0, "dark_border": True}
        mean, std, size = state["mean"], state["std"], state["size"]
        channels, low, high = state["channels"], state["low"], state["high"]
        numbers = [*mean, *std, low, high]
        valid = (
            all(isinstance(value, float) and math.isfinite(value) for value in numbers)
            and type(channels) is int
            and 0 < channels == len(mean) == len(std)
            and min(std) > 0
            and low < high
            and len(size) == 2
            and all(type(side) is int and 1 <= side <= MAX_SIDE for side in size)
            and isinstance(state["resized"], bool)
            and isinstance(state["dark_border"], bool)
        )
        if not valid:
            raise ValueError("the description of the images is invalid")
        return cls(
            channels, (size[0], size[1]), state["resized"], tuple(mean), tuple(std), low, high, state["dark_border"]
        )


def size_text(size: tuple[int, int]) -> str:
    """Return (height, width) as messages write it."""
    return f"{size[0]}×{size[1]}"
