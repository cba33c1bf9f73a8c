"""Which checkpoint a run goes on from, and whether it may."""

from pathlib import Path

import torch

from distlenet.checkpoint.format import State, load_checkpoint, load_model
from distlenet.checkpoint.store import CheckpointStore, find_checkpoint
from distlenet.config.fields import to_yaml_value
from distlenet.config.loading import result_settings
from distlenet.config.schema import Config
from distlenet.utils.errors import UserError

POSITION = {"seed", "data.name", "data.drop_last", "data.synthetic_train", "train.global_batch_size"}
"""The settings that say which images come in which global batch: inside an epoch they must stay."""


def choose_resumable(config: Config, own: CheckpointStore, net: torch.nn.Module) -> tuple[Path, State] | None:
    """Follow ``checkpoint.resume`` to the checkpoint to go on from; None says: from scratch.

    A run that was started from a given checkpoint goes on from its own ones when the same command is run again.
    Raises UserError where a given one is missing, damaged, of another architecture or made with other
    settings, and where a run that is not to be resumed has checkpoints already, which would be lost.
    """
    resume = config.checkpoint.resume
    found = own.load_newest()
    if resume != "auto" and found is not None and (resume == "never" or str(found[1].get("started_from")) != resume):
        raise UserError(
            f"checkpoint.resume={resume}: the run folder {own.directory.parent} already holds {found[0].name}; "
            "give another run.name, or checkpoint.resume=auto to go on from there"
        )
    if found is None and resume not in ("auto", "never"):
        given = find_checkpoint(Path(resume))
        found = given, load_checkpoint(given)
    if found is None:
        return None
    path, state = found
    load_model(net, state, path)  # before the settings: another architecture is the plainer message
    check_same_settings(state, config, path)
    return path, state


def check_same_settings(state: State, config: Config, path: Path) -> None:
    """Raise UserError, naming the keys, where a checkpoint was made with settings that learn otherwise."""
    old, new = result_settings(state["config"]), result_settings(config.to_dict())
    differing = [key for key in new if type(old.get(key)) is not type(new[key]) or old.get(key) != new[key]]
    pairs = {key: f"{key} (was {to_yaml_value(old.get(key))}, now {to_yaml_value(new[key])})" for key in differing}
    if changed := [key for key in differing if key not in config.checkpoint.allow_changed]:
        raise UserError(
            f"checkpoint {path}: made with other settings: {', '.join(pairs[key] for key in changed)}; give another "
            f"run.name, or checkpoint.allow_changed=[{','.join(changed)}] to go on all the same"
        )
    if state.get("batch", 0) != 0 and (moved := [key for key in differing if key in POSITION]):
        raise UserError(
            f"checkpoint {path}: is {state['batch']} batches into an epoch, where {', '.join(pairs[k] for k in moved)} "
            "would repeat some images and skip others; go on from the end of an epoch"
        )
