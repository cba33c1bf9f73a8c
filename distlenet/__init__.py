"""Exact distributed training with PyTorch, of your network and your data; LeNet on Fashion-MNIST is built in.

The names below are the Python API. They are imported when they are used first: an entry point must not import torch
before it has read its environment.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distlenet.config.loading import load_config as load_config
    from distlenet.config.schema import Config as Config
    from distlenet.evaluate import evaluate as evaluate
    from distlenet.inference.trained_model import load_model as load_model
    from distlenet.task import Batch as Batch
    from distlenet.task import Datasets as Datasets
    from distlenet.task import SampleKeys as SampleKeys
    from distlenet.task import Task as Task
    from distlenet.tasks.image_classification import ImageClassification as ImageClassification
    from distlenet.train import train as train
    from distlenet.utils.errors import UserError as UserError

__version__ = "0.1.0"

MODULES = {
    "Batch": "distlenet.task",
    "Config": "distlenet.config.schema",
    "Datasets": "distlenet.task",
    "ImageClassification": "distlenet.tasks.image_classification",
    "SampleKeys": "distlenet.task",
    "Task": "distlenet.task",
    "UserError": "distlenet.utils.errors",
    "load_config": "distlenet.config.loading",
    "load_model": "distlenet.inference.trained_model",
}
COMMANDS = ("evaluate", "train")
"""Modules that can be called like the function of the same name in them: ``train(config)``."""

__all__ = [*MODULES, *COMMANDS]


def __getattr__(name: str) -> Any:
    if name in COMMANDS:
        return importlib.import_module(f"distlenet.{name}")
    if name in MODULES:
        return getattr(importlib.import_module(MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
