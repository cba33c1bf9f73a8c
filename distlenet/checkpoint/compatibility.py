"""Choose the checkpoint from which a run resumes, and check that it fits the run."""

from pathlib import Path

import torch

from distlenet.checkpoint.format import State, load_checkpoint, load_model
from distlenet.checkpoint.store import CheckpointStore, find_checkpoint
from distlenet.config.fields import FIELDS, flatten, to_yaml_value
from distlenet.config.loading import result_settings
from distlenet.config.schema import Config
from distlenet.utils.errors import UserError

ORDER_SETTINGS = {
    "seed",
    "task.name",
    "task.args",
    "data.name",
    "data.args",
    "data.drop_last",
    "data.validation",
    "data.synthetic_train",
    "train.global_batch_size",
}
"""Settings that determine the samples of each global batch; they cannot change inside an epoch."""


def choose_resumable(config: Config, store: CheckpointStore, model: torch.nn.Module) -> tuple[Path, State] | None:
    """Return the checkpoint that ``checkpoint.resume`` selects, or None to start from scratch.

    A run that started from a given checkpoint resumes from its own ones when the same command runs again. Raise
    UserError if the given checkpoint is missing, damaged or does not fit ``model`` or the settings, or if the run has
    checkpoints but must not resume, because it would overwrite them.
    """
    resume = config.checkpoint.resume
    selected = store.load_newest()
    if resume != "auto" and selected and (resume == "never" or str(selected[1].get("started_from")) != resume):
        raise UserError(
            f"checkpoint.resume={resume}: the run directory {store.directory.parent} already holds {selected[0].name}; "
            "give another run.name, or checkpoint.resume=auto to resume from it"
        )
    if selected is None and resume not in ("auto", "never"):
        path = find_checkpoint(resume)
        selected = path, load_checkpoint(path)
    if selected is not None:
        path, state = selected
        load_model(model, state, path)  # before the settings: a different architecture is the clearer message
        check_same_settings(state, config, path)
    return selected


def check_same_settings(state: State, config: Config, path: Path) -> None:
    """Raise UserError that names the settings that affect the result and differ from those of the checkpoint."""
    new = result_settings(config.to_dict())
    defaults = {key: field.default for key, field in FIELDS.items()}
    old = result_settings({**defaults, **dict(flatten(state["config"]))})  # it may lack newer settings
    changes = {
        key: f"{key} (was {to_yaml_value(old.get(key))}, now {to_yaml_value(new[key])})"
        for key in new
        if key in old  # virtual shards: only if both use them
        if type(old.get(key)) is not type(new[key]) or old.get(key) != new[key]
    }
    if refused := [key for key in changes if key not in config.checkpoint.allow_changed]:
        raise UserError(
            f"checkpoint {path}: made with other settings: {', '.join(changes[key] for key in refused)}; give another "
            f"run.name, or checkpoint.allow_changed=[{','.join(refused)}] to resume anyway"
        )
    if state.get("batch", 0) != 0 and (moved := [changes[key] for key in changes if key in ORDER_SETTINGS]):
        raise UserError(
            f"checkpoint {path}: is {state['batch']} batches into an epoch, and {', '.join(moved)} would repeat some "
            "samples and skip others; resume from the end of an epoch"
        )
