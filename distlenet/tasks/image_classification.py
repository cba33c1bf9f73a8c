"""Classification of grey images with cross-entropy: the built-in task."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distlenet.config.schema import Config
from distlenet.data.sources import ImageData, load_images
from distlenet.models.registry import make_model
from distlenet.task import Datasets, SampleKeys, Task
from distlenet.tasks.error_analysis import ClassificationErrors
from distlenet.tasks.image_transform import ImageTransform, mean_and_std

ImagesAndLabels = tuple[Tensor, Tensor]
"""Images (n, H, W) uint8 as stored, or (n, 1, 32, 32) float32 as transformed; labels int64 (n,)."""


class ImageClassification(Task):
    """Train ``config.model`` to classify the images of ``config.data``."""

    def __init__(self, config: Config) -> None:
        """Load the data. Raise UserError if it is unavailable or damaged. A collective."""
        super().__init__(config)
        self.data: ImageData = load_images(config.data)
        mean, std = mean_and_std(self.data.train.images)
        self.image_transform = ImageTransform(mean, std, config.data.augment, config.data.shift)

    def model(self) -> nn.Module:
        """Return a new network on the CPU."""
        config = self.config.model
        return make_model(config.name, config.channels_last, torch.device("cpu"))

    def datasets(self) -> Datasets:
        """Return training and test images."""
        return Datasets(self.data.train, self.data.test, self.data.source, classes=self.data.classes)

    def transform(self, data: ImagesAndLabels, keys: SampleKeys | None) -> ImagesAndLabels:
        """Pad, augment and normalise the images."""
        images, labels = data
        return self.image_transform(images, keys), labels

    def loss(self, model: nn.Module, data: ImagesAndLabels) -> tuple[Tensor, Tensor]:
        """Return cross-entropy in nats, float32 (n,), and logits (n, C); label smoothing in training mode only."""
        inputs, labels = data
        logits = model(inputs).float()
        smoothing = self.config.train.label_smoothing if model.training else 0.0
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing), logits

    def metrics(self, outputs: Tensor, data: ImagesAndLabels) -> dict[str, Tensor]:
        """Return whether each sample is classified correctly."""
        return {"accuracy": outputs.argmax(1) == data[1]}

    def error_analysis(self, device: torch.device) -> ClassificationErrors:
        """Return an empty confusion matrix and list of mistakes."""
        return ClassificationErrors(self.data.test.images, self.data.classes, device)

    def state_dict(self) -> dict[str, Any]:
        """Return normalisation, image size and class names."""
        transform, size = self.image_transform, self.data.test.images.shape[1]
        return {"mean": transform.mean, "std": transform.std, "size": size, "classes": list(self.data.classes)}
