"""The networks that are exported: one module each, with tensors by name as input and output."""

from typing import Any

import torch
from torch import Tensor, nn

from distlenet.task import Task
from distlenet.tasks.image_classification import ImageClassification
from distlenet.utils.errors import UserError

Inputs = dict[str, Tensor]

OUTPUTS = ("outputs", "predictions")


class ExportedNetwork(nn.Module):
    """A trained network with the transform and the postprocessing of its task."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Return ``outputs``, what ``Task.predict`` returns, and ``predictions``, ``Task.postprocess`` of it."""
        single = len(inputs) == 1 and next(iter(inputs)) in (IMAGES, SINGLE)
        outputs = self.task.predict(self.model, next(iter(inputs.values())) if single else inputs)
        return both_outputs(self.task, outputs)


class TransformOnly(nn.Module):
    """The transform of an image classification."""

    def __init__(self, task: ImageClassification) -> None:
        super().__init__()
        self.task = task

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Return the input of the network, float32 (n, C, height, width), as ``transformed``."""
        (images,) = inputs.values()
        labels = torch.zeros(images.shape[0], dtype=torch.int64, device=images.device)
        return {TRANSFORMED: self.task.transform((images, labels), None)[0]}


class NetworkOnly(nn.Module):
    """The network of an image classification, and the postprocessing."""

    def __init__(self, model: nn.Module, task: ImageClassification) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Return ``outputs`` and ``predictions`` of transformed images."""
        (transformed,) = inputs.values()
        return both_outputs(self.task, self.model(transformed).float())


IMAGES, SINGLE, TRANSFORMED = "images", "inputs", "transformed"
"""The names of the input of an image classification, of another single input, and of transformed images."""


def name_inputs(task: Task, data: Any) -> Inputs:
    """Return the inputs of the exported network by name, for collated samples. Raise UserError for other types."""
    inputs = task.export_inputs(data)
    if isinstance(inputs, Tensor):
        return {IMAGES if isinstance(task, ImageClassification) else SINGLE: inputs}
    if isinstance(inputs, dict) and inputs and all(isinstance(value, Tensor) for value in inputs.values()):
        return {str(name): value for name, value in inputs.items()}
    name = type(task).__name__
    raise UserError(f"{name}.export_inputs: returned a {type(inputs).__name__}; return a tensor, or tensors by name")


def both_outputs(task: Task, outputs: Any) -> dict[str, Tensor]:
    """Return the outputs and their postprocessing by name. Raise UserError if one is not a tensor."""
    predictions = task.postprocess(outputs)
    for method, value in (("predict", outputs), ("postprocess", predictions)):
        if not isinstance(value, Tensor) or value.dim() == 0:
            raise UserError(
                f"{type(task).__name__}.{method}: returned a {type(value).__name__}; to be exported, it must return "
                "one tensor with the samples in its first dimension"
            )
    if predictions is outputs:  # two outputs of a graph are two values
        predictions = outputs.clone()
    return {"outputs": outputs, "predictions": predictions}
