"""Load the network of a checkpoint, for use from Python."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from distlenet.checkpoint.format import State, evaluation_weights, load_checkpoint, load_task_state
from distlenet.checkpoint.format import load_model as load_weights
from distlenet.checkpoint.store import find_checkpoint
from distlenet.config.loading import check_modules, load_config, warn_of_unused_settings
from distlenet.task import Data, Task, new_model
from distlenet.tasks.image_classification import ImageClassification
from distlenet.tasks.registry import create_task, make_task
from distlenet.utils.errors import UserError, describe_error


class TrainedModel(nn.Module):
    """A network with the transform of its task, in evaluation mode on the CPU."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, data: Data) -> Any:
        """Return the outputs for a batch of samples as the dataset holds them; see ``Task.predict``.

        Raise UserError if the default of ``Task.predict`` fails on them.
        """
        kind = type(self.task)
        if kind.predict is not Task.predict:
            return self.task.predict(self.model, data)
        try:
            return self.task.predict(self.model, data)
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{kind.__name__}.predict: the default needs targets ({describe_error(error)}); define "
                f"{kind.__name__}.predict, which takes the inputs alone; see docs/own.md"
            ) from error


def load_model(
    checkpoint: str | Path,
    task: type[Task] | None = None,
    overrides: Sequence[str] = (),
    files: Sequence[str] = (),
) -> TrainedModel:
    """Load a checkpoint file, or the newest one of a run directory. The data of the run is not needed.

    ``task`` is the class that was trained, called with the settings of the checkpoint and ``task.args``; it can also be
    named in ``overrides`` or in ``files`` of settings, and so must be a network that is not built in:
    ``["model.name=my_package:Net"]``. A checkpoint cannot cause an import. Raise UserError if the checkpoint does not
    fit the task.
    """
    file = find_checkpoint(checkpoint)
    return restore_model(evaluation_weights(load_checkpoint(file)), file, task, overrides, files)


def restore_model(
    state: State,
    file: Path,
    task: type[Task] | None = None,
    overrides: Sequence[str] = (),
    files: Sequence[str] = (),
) -> TrainedModel:
    """Return the network of the checkpoint ``state`` with the weights ``state["model"]``; see ``load_model``."""
    names = ["task.name"] if task is None else []
    if task is None or task.model is ImageClassification.model:
        names.append("model.name")
    config = load_config(files, overrides, state["config"], names)
    check_modules(config)
    warn_of_unused_settings(files, overrides, state["config"])
    made = create_task(task or make_task, config)
    load_task_state(made, state, file)
    model = new_model(made)
    load_weights(model, state, file)
    return TrainedModel(model, made).eval()
