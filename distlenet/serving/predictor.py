"""Predict with a checkpoint of the built-in image classification."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from distlenet.checkpoint.format import State, evaluation_weights, load_checkpoint, load_model
from distlenet.checkpoint.store import find_checkpoint
from distlenet.config.loading import load_config
from distlenet.distributed.context import set_threads
from distlenet.models.networks import make_model
from distlenet.tasks.image_classification import ImageClassification, input_size
from distlenet.tasks.image_format import ImageFormat
from distlenet.tasks.image_transform import ImageTransform
from distlenet.utils.errors import UserError


class Predictor:
    """A trained network, the format of its images, its input transform and its class names."""

    def __init__(self, path: Path, overrides: Sequence[str] = ()) -> None:
        """Load a checkpoint file, or the newest one of a run directory. Raise UserError if it cannot predict.

        ``overrides`` are settings; a network that is not built in must be named there again.
        """
        set_threads(None)
        file = find_checkpoint(path)
        state = load_checkpoint(file)
        config = load_config(overrides=overrides, base=state["config"], used_names=["task.name", "model.name"])
        self.images, self.classes = read_task_state(state, file)
        self.transform = ImageTransform(self.images, input_size(config.model.name, self.images))
        self.model = make_model(config.model)
        load_model(self.model, evaluation_weights(state), file)
        self.model.eval()
        channels = [] if self.images.channels == 1 else [self.images.channels]
        probabilities = self(torch.zeros(1, *channels, *self.images.size, dtype=torch.uint8))
        if probabilities.shape[1] != len(self.classes):
            raise UserError(
                f"checkpoint {file}: has {len(self.classes)} class names, but the network has {probabilities.shape[1]} "
                "outputs; give another checkpoint"
            )
        if not probabilities.isfinite().all():
            raise UserError(f"checkpoint {file}: the network's outputs are not finite; give another checkpoint")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return class probabilities (n, classes) of images, uint8 (n, H, W) or (n, 3, H, W), as in evaluation."""
        batches = images.split(ImageClassification.eval_batch_size)
        return torch.cat([self.model(self.transform(batch)).float().softmax(1) for batch in batches])


def read_task_state(state: State, path: Path) -> tuple[ImageFormat, list[str]]:
    """Return the format of the images and the class names. Raise UserError if one is missing or invalid."""
    try:
        task, classes = state["task"], state["task"]["classes"]
        task["mean"], task["std"], task["size"]
    except (LookupError, TypeError, ValueError) as error:  # state["task"] may be anything, even a tensor
        raise UserError(
            f"checkpoint {path}: does not describe its images ({type(error).__name__}: {error}); give another"
        ) from error
    try:
        images = ImageFormat.from_dict(task)
        if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
            raise ValueError("class names")
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"checkpoint {path}: its description of images, state['task'], is invalid; give another"
        ) from error
    if images.channels not in (1, 3) or (images.low, images.high) != (0.0, 255.0):
        raise UserError(
            f"checkpoint {path}: is of images with {images.channels} channels and values from {images.low:g} to "
            f"{images.high:g}; image files have 1 or 3 channels and values from 0 to 255: predict from Python"
        )
    return images, classes
