"""A checkpoint file: written atomically, checked when it is loaded; ``archive`` defines its bytes."""

import contextlib
import os
import shutil
import textwrap
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from distlenet.checkpoint import archive
from distlenet.checkpoint.archive import read_state, write_state
from distlenet.utils.errors import UserError, one_line
from distlenet.utils.files import replace_atomically, sync_path, temporary_path

State = dict[str, Any]


class CheckpointError(UserError):
    """A checkpoint cannot be read or is damaged."""


def write_atomically(state: State, path: Path) -> None:
    """Write ``state``; at any moment, even after a power cut, ``path`` is the old file or the new one."""
    replace_atomically(path, lambda file: write_state(state, file))


def link_atomically(source: Path, path: Path) -> None:
    """Make ``path`` a hard link to ``source``, or a copy if the file system has no links; as ``write_atomically``."""
    temporary = temporary_path(path)
    try:
        os.link(source, temporary)
    except OSError:
        with open(source, "rb") as original:
            replace_atomically(path, lambda file: shutil.copyfileobj(original, file))
        return
    try:
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # after a failure, or if ``path`` was this link already: then replace does nothing
    sync_path(path.parent)


def load_checkpoint(path: Path) -> State:
    """Load a checkpoint to CPU. Raise CheckpointError if it is unreadable, damaged, or not one of this package."""
    try:
        with open(path, "rb") as file:
            state = read_state(file)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"checkpoint {path}: cannot be read: {reason}; give another, or remove it") from error
    match state:
        case {"model": model, "config": dict(), "step": int(step), "epoch": int(epoch)} if min(step, epoch) >= 0:
            if is_weights(model) and is_weights(state.get("ema", {})):
                return cast(State, state)
    raise CheckpointError(f"checkpoint {path}: is not one of distlenet, with model, step, epoch and config")


def is_intact(path: Path) -> bool:
    """Return whether the bytes of a checkpoint match its checksum. Raise OSError if it cannot be read."""
    with open(path, "rb") as file:
        return archive.is_intact(file)


def is_weights(value: Any) -> bool:
    """Return whether ``value`` is a dict of tensors by name, as the state of a model."""
    return isinstance(value, dict) and all(isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in value.items())


def evaluation_weights(state: State) -> State:
    """Return ``state`` with the weights that an evaluation or a prediction loads: their average, if it has one."""
    return {**state, "model": state.get("ema", state["model"])}


def load_model(model: torch.nn.Module, state: State, path: Path) -> None:
    """Load the weights, ``state["model"]``, into ``model``. Raise UserError if they belong to another architecture."""
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        name, reason = type(model).__name__, textwrap.shorten(str(error), 1000, placeholder=" ...")
        raise UserError(f"checkpoint {path}: is of another architecture than {name}: {reason}") from error


class HasState(Protocol):
    """A task: what it returned when the checkpoint was written is loaded again."""

    def load_state_dict(self, state: Any) -> None:
        """Load a saved state."""


def load_task_state(task: HasState, state: State, path: Path) -> None:
    """Load the state of a task from a checkpoint. Raise UserError if it does not fit the task."""
    saved = state.get("task", {})
    try:
        if not isinstance(saved, dict):
            raise TypeError(f"it is a {type(saved).__name__}")
        task.load_state_dict(saved)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else one_line(error)
        raise UserError(
            f"checkpoint {path}: its task state does not fit {type(task).__name__}: {reason}; give the task that was "
            "trained, or a checkpoint of this version"
        ) from error
