"""Predictions of a trained network."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distlenet.checkpoint.format import State, load_checkpoint, load_model
from distlenet.checkpoint.store import find_checkpoint
from distlenet.config.loading import load_config
from distlenet.data.transforms import SIZE, Prepare
from distlenet.distributed.context import set_threads
from distlenet.models.registry import make_model
from distlenet.serving.image_files import Unreadable, find_pictures, read_picture
from distlenet.training.evaluation import EVAL_BATCH
from distlenet.utils.errors import UserError


class Predictor:
    """A trained network and what its pictures must look like."""

    def __init__(self, path: Path) -> None:
        """Load the checkpoint at ``path``, a file or a run folder. Raises UserError."""
        set_threads(None)
        found = find_checkpoint(path)
        state = load_checkpoint(found)
        config = load_config(base=state["config"])
        self.classes, self.size, mean, std = inputs_of(state, found)
        self.prepare = Prepare(mean, std)
        self.net = make_model(config.model.name, config.model.channels_last, torch.device("cpu"))
        load_model(self.net, state, found)
        self.net.eval()
        with torch.no_grad():
            logits = self.net(self.prepare(torch.zeros(1, self.size, self.size, dtype=torch.uint8)))
        if logits.shape != (1, len(self.classes)) or not logits.isfinite().all():
            raise UserError(
                f"checkpoint {found}: names {len(self.classes)} classes, but its network gives {logits.shape[1]} "
                f"numbers, {'finite' if logits.isfinite().all() else 'not all of them finite'}; give another"
            )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the probabilities (n, C) of uint8 images (n, H, W), computed in the batches of an evaluation."""
        parts = images.split(EVAL_BATCH)
        return torch.cat([self.net(self.prepare(part)).float().softmax(1) for part in parts])


def inputs_of(state: State, path: Path) -> tuple[tuple[str, ...], int, float, float]:
    """Return a checkpoint's classes, and of its images the side in pixels, mean and standard deviation.

    Raises UserError where they are not there, or cannot be.
    """
    try:
        classes, size, mean, std = state["classes"], *(state["input"][name] for name in ("size", "mean", "std"))
    except (LookupError, TypeError, ValueError) as error:  # "input" may be anything, a tensor too
        raise UserError(
            f"checkpoint {path}: does not say what its images are like ({type(error).__name__}: {error}); give another"
        ) from error
    numbers = all(isinstance(value, float) and math.isfinite(value) for value in (mean, std))
    names = isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes)
    if not (numbers and std > 0 and names and type(size) is int and 1 <= size <= SIZE):
        raise UserError(
            f"checkpoint {path}: says of its images what cannot be (state['input'], ['classes']); give another"
        )
    return tuple(classes), size, mean, std


def read_all(names: list[str], invert: str, size: int) -> tuple[list[Tensor], list[Path], list[str]]:
    """Read all pictures; return those that could be read, their paths, and why the others could not."""
    images, paths, failures = [], [], []
    for name in names:
        try:
            found = find_pictures([name])
        except Unreadable as error:
            failures.append(str(error))
            continue
        for path in found:
            try:
                images.append(read_picture(path, invert, size))
                paths.append(path)
            except Unreadable as error:
                failures.append(str(error))
    return images, paths, failures


def answer(probabilities: Tensor, classes: tuple[str, ...], top: int) -> list[dict[str, Any]]:
    """Return the ``top`` likeliest classes of one picture, the likeliest first."""
    values, order = probabilities.topk(top)
    return [
        {"class": classes[index], "label": index, "probability": value}
        for value, index in zip(values.tolist(), order.tolist(), strict=True)
    ]
