"""Classification of images, grey or in color, with cross-entropy: the built-in task."""

import traceback
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distlenet.config.schema import Config
from distlenet.data.sources import load_images
from distlenet.distributed.collectives import from_rank_0
from distlenet.images.image_format import ImageFormat, size_text
from distlenet.models.lenet import INPUT_SHAPE
from distlenet.models.networks import make_model
from distlenet.task import Datasets, SampleKeys, Task
from distlenet.tasks.augmentation import make_augmentation
from distlenet.tasks.error_analysis import ClassificationErrors
from distlenet.tasks.image_statistics import measure_images
from distlenet.tasks.image_transform import ImageTransform
from distlenet.tasks.mixing import Mixing
from distlenet.utils.errors import UserError, one_line

ImagesAndLabels = tuple[Tensor, Tensor]
"""Images (n, H, W) or (n, C, H, W) as stored, or (n, C, H, W) float32 as transformed; labels int64 (n,).

After Mixup and CutMix, float32 (n, classes) with the share of each class in place of the labels.
"""


class ImageClassification(Task):
    """Train ``config.model`` to classify the images of ``config.data``."""

    images: ImageFormat
    image_transform: ImageTransform

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.data: Datasets | None = None
        self.classes: tuple[str, ...] = ()
        self.checked = False
        self.mixing: Mixing | None = None
        self.negative_shares: Tensor | None = None  # float32 (C, C), of all classes after label smoothing, by label
        self.partners = config.data.mixup > 0 or config.data.cutmix > 0
        own_transform = type(self).transform is not ImageClassification.transform
        self.augmentation = make_augmentation(config.data)
        augmented = config.data.augment != "none" or self.augmentation is not None
        random = own_transform or self.partners or augmented
        self.random_transform = type(self).random_transform and random

    def model(self) -> nn.Module:
        """Return a new network on the CPU."""
        return make_model(self.config.model)

    def datasets(self) -> Datasets:
        """Load the data at the first call: a collective.

        Raise UserError if it is unavailable, damaged, or does not fit the network.
        """
        if self.data is None:
            self.data = data = load_images(self.config.data)
            images = from_rank_0(lambda: measure_images(data.train, self.config.data.size is not None))
            self._set_format(images, tuple(data.classes or ()))
            if self.partners:
                self.mixing = self._make_mixing()
        return self.data

    def _set_format(self, images: ImageFormat, classes: tuple[str, ...]) -> None:
        config = self.config
        own_network = type(self).model is not ImageClassification.model
        augmentation, crop = self.augmentation, None
        if augmentation is not None:
            augmentation.check(images)
            crop = None if augmentation.crop is None else augmentation.crop.size
        size = None if own_network else input_size(config.model.name, images, crop)
        self.images, self.classes = images, classes
        self.image_transform = ImageTransform(images, size, config.data.augment, config.data.shift, augmentation)

    def _make_mixing(self) -> Mixing:
        mixup, cutmix = self.config.data.mixup, self.config.data.cutmix
        if not self.classes:
            name = "mixup" if mixup > 0 else "cutmix"
            raise UserError(f"data.{name}: needs the number of classes; return Datasets(classes=[...])")
        return Mixing(mixup, cutmix, len(self.classes))

    def transform(self, data: Any, keys: SampleKeys | None) -> ImagesAndLabels:
        """Crop, pad, augment and normalise the images, and mix them with those of their partners."""
        if self.mixing is None or keys is None:
            images, labels = data
            return self.image_transform(images, keys), labels
        (images, labels), (partners, partner_labels) = data
        images, partners = self.image_transform(images, keys), self.image_transform(partners, keys.split("partner"))
        return self.mixing(images, labels, partners, partner_labels, keys)

    def loss(self, model: nn.Module, data: ImagesAndLabels) -> tuple[Tensor, Tensor]:
        """Return cross-entropy in nats, float32 (n,), and logits (n, C); label smoothing in training mode only.

        Raise UserError if the network does not fit the images or the classes: at the first call, before the first step.
        """
        inputs, targets = data
        logits = (model(inputs) if self.checked else self._check(model, inputs)).float()
        smoothing = self.config.train.label_smoothing if model.training else 0.0
        if smoothing and logits.is_cuda and not targets.is_floating_point():
            return self._smoothed_losses(logits, targets, smoothing), logits
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing), logits

    def _smoothed_losses(self, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        """Return the cross-entropy (n,) of logits, float32 (n, C), and labels, int64 (n,), with label smoothing.

        By a table of targets: 14 kernels less than torch's function, which differs in the last bits on the CPU.
        """
        if self.negative_shares is None:
            classes = len(self.classes)
            shares = torch.full((classes, classes), smoothing / classes) + torch.eye(classes) * (1 - smoothing)
            self.negative_shares = -shares.to(labels.device)
        return (F.log_softmax(logits, 1) * self.negative_shares.index_select(0, labels)).sum(1)

    def metrics(self, outputs: Tensor, data: ImagesAndLabels) -> dict[str, Tensor]:
        """Return whether each sample is classified as its label, or as the label with the largest share if mixed."""
        targets = data[1]
        return {"accuracy": outputs.argmax(1) == (targets.argmax(1) if targets.is_floating_point() else targets)}

    def error_analysis(self, device: torch.device) -> ClassificationErrors | None:
        """Return an empty confusion matrix and list of mistakes; None if the classes are not known."""
        return None if not self.classes else ClassificationErrors(self.datasets().test, self.classes, device)

    def state_dict(self) -> dict[str, Any]:
        """Return the format of the images, with their statistics, and the class names."""
        return {**self.images.to_dict(), "classes": list(self.classes)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the format of the images and the class names: the data is not needed."""
        images, classes = ImageFormat.from_dict(state), state["classes"]
        if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
            raise ValueError("the class names are not a list of strings")
        self._set_format(images, tuple(classes))

    def predict(self, model: nn.Module, data: Tensor) -> Tensor:
        """Return logits, float32 (n, C), of images as stored: (n, H, W) or (n, C, H, W), through ``transform``."""
        count = data.shape[0]  # not len(data), which torch.export cannot trace
        labels = torch.zeros(count, dtype=torch.int64, device=data.device)
        inputs, _ = self.transform((data, labels), None)
        logits: Tensor = model(inputs)
        return logits.float()

    def postprocess(self, outputs: Tensor) -> Tensor:
        """Return what ``predict`` and a server show of the outputs: a probability per class, (n, C).

        By default the softmax. A task with several labels per image replaces it, for example by the sigmoid.
        """
        return outputs.softmax(1)

    def _check(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Return the logits. Raise UserError if the network fails, or does not return one value per class."""
        name, shape = f"model.name={self.config.model.name}", list(inputs.shape)
        try:
            logits: Any = model(inputs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            reason, advice = one_line(error), "give another network, model.args or data.size"
            if "view size" in reason:
                advice = "use flatten or reshape, or give model.channels_last=false"
            elif "channels" in reason:
                advice = f"give another network, or model.args for images with channels: {shape[1]}"
            raise UserError(
                f"{name}: does not accept images of shape {shape}: {reason} ({frame.filename}, line {frame.lineno}); "
                f"{advice}"
            ) from error
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(inputs):
            found = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise UserError(
                f"{name}: returned {found} for images of shape {shape}; expected one value per image and class, "
                f"[{len(inputs)}, {len(self.classes) or 'classes'}]"
            )
        self.classes = self.classes or tuple(map(str, range(logits.shape[1])))
        if logits.shape[1] != len(self.classes):
            raise UserError(
                f"{name}: returns {logits.shape[1]} values per image, but data.name={self.config.data.name} has "
                f"{len(self.classes)} classes; give a network with {len(self.classes)} outputs"
            )
        self.checked = True
        return logits


def input_size(model_name: str, images: ImageFormat, crop: tuple[int, int] | None = None) -> tuple[int, int] | None:
    """Return the height and width to which images, or what ``crop`` leaves of them, are padded; None: not at all.

    LeNet takes 32×32 pixels; smaller images are padded. Raise UserError if they are larger or in color.
    """
    if model_name != "lenet":
        return None
    channels, height, width = INPUT_SHAPE
    found, problems = crop or images.size, []
    if images.channels != channels:
        problems.append(f"these have {images.channels} channels; give another model.name")
    elif max(found[0] - height, found[1] - width) > 0:
        key = "size" if crop is None else "crop"
        problems.append(f"these have {size_text(found)}; give data.{key}={height} or another model.name")
    if problems:
        raise UserError(f"model.name=lenet: takes grey images of at most {height}×{width} pixels, but {problems[0]}")
    return height, width
