"""Classify images with a checkpoint of the built-in image classification, or of a task that extends it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from distlenet.checkpoint.store import find_checkpoint
from distlenet.distributed.context import set_threads
from distlenet.inference.trained_model import load_model
from distlenet.tasks.image_classification import ImageClassification
from distlenet.utils.errors import UserError

FROM_PYTHON = "predict from Python, with distlenet.load_model"


class Predictor:
    """A trained network with its task, the format of its images and its class names."""

    def __init__(self, path: str | Path, overrides: Sequence[str] = (), files: Sequence[str] = ()) -> None:
        """Load a checkpoint file, or the newest one of a run directory. Raise UserError if it cannot predict.

        ``overrides`` are settings; a task and a network that are not built in must be named in them or in ``files``.
        """
        set_threads(None)
        file = find_checkpoint(path)
        self.trained = load_model(file, None, overrides, files)
        task = self.trained.task
        if not isinstance(task, ImageClassification):
            raise UserError(f"task.name={task.config.task.name}: is not an ImageClassification; {FROM_PYTHON}")
        self.task, self.images = task, task.images
        if self.images.channels not in (1, 3) or (self.images.low, self.images.high) != (0.0, 255.0):
            raise UserError(
                f"checkpoint {file}: is of images with {self.images.channels} channels and values from "
                f"{self.images.low:g} to {self.images.high:g}; image files have 1 or 3 channels and values from 0 to "
                f"255: {FROM_PYTHON}"
            )
        channels = [] if self.images.channels == 1 else [self.images.channels]
        probabilities = self(torch.zeros(1, *channels, *self.images.size, dtype=torch.uint8))
        self.classes = task.classes or tuple(map(str, range(probabilities.shape[1])))
        if probabilities.shape[1] != len(self.classes):
            raise UserError(
                f"checkpoint {file}: has {len(self.classes)} class names, but the network has {probabilities.shape[1]} "
                f"outputs; {FROM_PYTHON}"
            )
        if not probabilities.isfinite().all():
            raise UserError(f"checkpoint {file}: the network's outputs are not finite; give another checkpoint")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return class probabilities (n, classes) of images, uint8 (n, H, W) or (n, 3, H, W), in float32.

        Raise UserError if the task does not return one value per class.
        """
        return torch.cat([self._probabilities(batch) for batch in images.split(self.task.eval_batch_size)])

    def _probabilities(self, images: Tensor) -> Tensor:
        outputs = self.trained(images)
        if not isinstance(outputs, Tensor) or outputs.dim() != 2 or len(outputs) != len(images):
            found = f"shape {list(outputs.shape)}" if isinstance(outputs, Tensor) else f"type {type(outputs).__name__}"
            raise UserError(
                f"{type(self.task).__name__}.predict: returned outputs of {found} for {len(images)} images; expected "
                f"[{len(images)}, classes]; {FROM_PYTHON}"
            )
        return self.task.postprocess(outputs)
