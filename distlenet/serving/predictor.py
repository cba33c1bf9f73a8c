"""Predict with a checkpoint of the built-in image classification."""

import math
from pathlib import Path

import torch
from torch import Tensor

from distlenet.checkpoint.format import State, load_checkpoint, load_model
from distlenet.checkpoint.store import find_checkpoint
from distlenet.config.loading import load_config
from distlenet.distributed.context import set_threads
from distlenet.models.registry import make_model
from distlenet.tasks.image_classification import ImageClassification
from distlenet.tasks.image_transform import SIZE, ImageTransform
from distlenet.utils.errors import UserError


class Predictor:
    """A trained network, its input transform and its class names."""

    def __init__(self, path: Path) -> None:
        """Load a checkpoint file, or the newest one of a run directory. Raise UserError if it cannot predict."""
        set_threads(None)
        file = find_checkpoint(path)
        state = load_checkpoint(file)
        config = load_config(base=state["config"])
        mean, std, self.size, self.classes = read_task_state(state, file)
        self.transform = ImageTransform(mean, std)
        self.model = make_model(config.model.name, config.model.channels_last, torch.device("cpu"))
        load_model(self.model, state, file)
        self.model.eval()
        probabilities = self(torch.zeros(1, self.size, self.size, dtype=torch.uint8))
        if probabilities.shape[1] != len(self.classes):
            raise UserError(
                f"checkpoint {file}: has {len(self.classes)} class names, but the network has {probabilities.shape[1]} "
                "outputs; give another checkpoint"
            )
        if not probabilities.isfinite().all():
            raise UserError(f"checkpoint {file}: the network's outputs are not finite; give another checkpoint")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return class probabilities (n, C) of uint8 images (n, H, W), in batches as in evaluation."""
        batches = images.split(ImageClassification.eval_batch_size)
        return torch.cat([self.model(self.transform(batch)).float().softmax(1) for batch in batches])


def read_task_state(state: State, path: Path) -> tuple[float, float, int, list[str]]:
    """Return mean, standard deviation, image size and class names. Raise UserError if one is missing or invalid."""
    try:
        mean, std, size, classes = (state["task"][key] for key in ("mean", "std", "size", "classes"))
    except (LookupError, TypeError, ValueError) as error:  # state["task"] may be anything, even a tensor
        raise UserError(
            f"checkpoint {path}: does not describe its images ({type(error).__name__}: {error}); give another"
        ) from error
    numbers_ok = all(isinstance(value, float) and math.isfinite(value) for value in (mean, std)) and std > 0
    size_ok = type(size) is int and 1 <= size <= SIZE
    if not (numbers_ok and size_ok and isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise UserError(f"checkpoint {path}: its description of images, state['task'], is invalid; give another")
    return mean, std, size, classes
