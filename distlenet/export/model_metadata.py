"""model.json: what a program that serves the network needs to know."""

from typing import Any

import torch

from distlenet import __version__
from distlenet.export.exported_network import OUTPUTS
from distlenet.export.reference import Reference
from distlenet.export.trained_source import RunData, TrainedSource
from distlenet.tasks.image_classification import ImageClassification
from distlenet.utils.exported_model import MODEL_FORMAT


def header_of(source: TrainedSource, name: str | None, data: RunData | None) -> dict[str, Any]:
    """Return what each file holds about its origin, also as its own metadata."""
    task = source.trained.task
    classes = getattr(task, "classes", None) or (data.datasets.classes if data is not None else None)
    return {
        "format": MODEL_FORMAT,
        "name": name or source.name,
        "distlenet": __version__,
        "torch": str(torch.__version__).partition("+")[0],
        "checkpoint": {
            "path": source.given,
            "file": source.file.name,
            "sha256": source.sha256,
            "step": source.state["step"],
            "weights": source.weights,
        },
        "classes": None if classes is None else [str(each) for each in classes],
        "images": image_format(source),
        "task": _plain(task.state_dict()),
    }


def model_json(
    header: dict[str, Any], reference: Reference, files: dict[str, dict[str, Any]], check: str
) -> dict[str, Any]:
    """Return the content of model.json."""

    def describe(name: str) -> dict[str, Any]:
        return {"dtype": reference.dtypes[name], "shape": reference.shapes[name]}

    return {
        **header,
        "inputs": {name: describe(name) for name in reference.example},
        "outputs": {name: describe(name) for name in OUTPUTS},
        "check": check,
        "files": files,
    }


def image_format(source: TrainedSource) -> dict[str, Any] | None:
    """Return the format of the images, if they are like image files; else None."""
    task = source.trained.task
    if not isinstance(task, ImageClassification):
        return None
    images = task.images
    readable = images.channels in (1, 3) and (images.low, images.high) == (0.0, 255.0)
    return images.to_dict() if readable else None


def _plain(value: Any) -> Any:
    """Return the parts of a state that JSON can hold; tensors are left out."""
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items() if not isinstance(each, torch.Tensor)}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value if not isinstance(each, torch.Tensor)]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
