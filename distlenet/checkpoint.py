"""Checkpoints: one file each of tensors and plain values, replaced atomically, the newest K and the best."""

import contextlib
import io
import os
import re
import tempfile
from pathlib import Path
from typing import Any, cast

import torch

from distlenet.config import result_settings
from distlenet.errors import UserError
from distlenet.schema import Config

State = dict[str, Any]

TORN = ".writing-"  # how the names of temporary files begin

POSITION = {"seed", "data.name", "data.drop_last", "data.synthetic_train", "train.global_batch_size"}
"""The settings that say which images come in which global batch: inside an epoch they must stay."""

FORMAT = re.compile(r"step-(\d+)\.pt")


class CheckpointFolder:
    """A run's ``checkpoints/``: files ``step-00001234.pt`` and ``best.pt``. Rank 0 alone writes."""

    def __init__(self, folder: Path, keep: int) -> None:
        """Use ``folder``, which need not exist yet, and keep the ``keep`` newest files."""
        self.folder = folder
        self.keep = keep

    def newest(self) -> Path | None:
        """Return the file of the highest step; None where there is none."""
        files = self._by_step()
        return files[-1] if files else None

    def save(self, state: State, best: bool) -> Path:
        """Write ``state``, also as the best where it is, then drop the files beyond the newest K.

        Raises UserError where it cannot be written; every older file is then still whole.
        """
        path = self.folder / f"step-{state['step']:08d}.pt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if best:  # first: a job that dies between the two evaluates again, and finds it the best again
                write_atomically(state, self.folder / "best.pt")
            write_atomically(state, path)
            for old in self._by_step()[: -self.keep]:
                old.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"checkpoint {path}: cannot be written: {error.strerror or error}") from error
        return path

    def remove_torn(self) -> None:
        """Remove what jobs that died while writing have left. Nobody may be writing."""
        for path in self.folder.glob(f"{TORN}*"):
            path.unlink(missing_ok=True)

    def _by_step(self) -> list[Path]:
        try:
            paths = [path for path in self.folder.iterdir() if FORMAT.fullmatch(path.name)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise UserError(f"checkpoint {self.folder}: cannot be read: {error.strerror or error}") from error
        return sorted(paths, key=lambda path: int(path.stem.partition("-")[2]))


def write_atomically(state: State, path: Path) -> None:
    """Write ``state`` so that ``path`` is, at every moment and after a power cut, the old file or the new.

    A temporary file in the same folder, fsync, rename, fsync of the folder.
    """
    content = io.BytesIO()
    torch.save(state, content)  # in memory first: writing to a full disk, it would not raise an OSError
    descriptor, temporary = tempfile.mkstemp(prefix=TORN, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner reads
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def find_checkpoint(path: Path) -> Path:
    """Return ``path`` if it is a file, else the newest checkpoint of the run folder ``path``.

    Raises UserError where there is none.
    """
    try:
        if path.is_file():
            return path
        path.stat()
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {path}: no such file or run folder") from error
    except OSError as error:
        raise UserError(f"checkpoint {path}: cannot be read: {error.strerror or error}") from error
    newest = CheckpointFolder(path / "checkpoints", keep=1).newest() or CheckpointFolder(path, keep=1).newest()
    if newest is None:
        raise UserError(f"checkpoint {path}: holds no checkpoints/step-*.pt; give a checkpoint file or a run folder")
    return newest


def load_checkpoint(path: Path) -> State:
    """Read a checkpoint to CPU, with ``weights_only=True``: nothing in the file is executed.

    Raises UserError where the file cannot be read or is not a checkpoint of this package.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"checkpoint {path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # bytes that are no checkpoint make torch.load raise almost anything
        raise UserError(f"checkpoint {path}: is damaged or not a checkpoint; give another, or remove it") from error
    whole = (
        isinstance(state, dict)
        and isinstance(model := state.get("model"), dict)
        and all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in model.items())
        and isinstance(state.get("config"), dict)
        and all(isinstance(state.get(name), int) and state[name] >= 0 for name in ("step", "epoch"))
    )
    if not whole:
        raise UserError(f"checkpoint {path}: is not one of distlenet, which holds model, step, epoch and config")
    return cast(State, state)


def load_model(net: torch.nn.Module, state: State, path: Path) -> None:
    """Load the weights of a checkpoint. Raises UserError where they belong to another architecture."""
    mine, theirs = net.state_dict(), state["model"]
    missing, extra = sorted(mine.keys() - theirs.keys()), sorted(theirs.keys() - mine.keys())
    differing = [
        f"{name} {tuple(theirs[name].shape)} instead of {tuple(mine[name].shape)}"
        for name in mine
        if name in theirs and mine[name].shape != theirs[name].shape
    ]
    if missing or extra or differing:
        parts = [f"without {', '.join(missing)}"] * bool(missing)
        parts += [f"with unknown {', '.join(extra)}"] * bool(extra) + differing
        raise UserError(f"checkpoint {path}: is of another architecture than {type(net).__name__}: {'; '.join(parts)}")
    net.load_state_dict(theirs)


def choose_resumable(config: Config, own: CheckpointFolder, net: torch.nn.Module) -> tuple[Path, State] | None:
    """Follow ``checkpoint.resume`` to the checkpoint to go on from; None says: from scratch.

    A run that was started from a given checkpoint goes on from its own ones when the same command is run again.
    Raises UserError where a given one is missing, damaged, of another architecture or made with other
    settings, and where a run that is not to be resumed has checkpoints already, which would be lost.
    """
    resume, newest = config.checkpoint.resume, own.newest()
    path = newest if resume == "auto" else None if resume == "never" else find_checkpoint(Path(resume))
    if resume != "auto" and newest is not None:
        if resume == "never" or load_checkpoint(newest).get("started_from") != resume:
            raise UserError(
                f"checkpoint.resume={resume}: the run folder {own.folder.parent} already holds {newest.name}; "
                "give another run.name, or checkpoint.resume=auto to go on from there"
            )
        path = newest
    if path is None:
        return None
    state = load_checkpoint(path)
    load_model(net, state, path)  # before the settings: another architecture is the plainer message
    check_same_settings(state, config, path)
    return path, state


def check_same_settings(state: State, config: Config, path: Path) -> None:
    """Raise UserError, naming the keys, where a checkpoint was made with settings that learn otherwise."""
    old, new = result_settings(state["config"]), result_settings(config.to_dict())
    differing = [key for key in new if old.get(key) != new[key]]
    pairs = {key: f"{key} (was {old.get(key)}, now {new[key]})" for key in differing}
    if changed := [key for key in differing if key not in config.checkpoint.allow_changed]:
        raise UserError(
            f"checkpoint {path}: made with other settings: {', '.join(pairs[key] for key in changed)}; give another "
            f"run.name, or checkpoint.allow_changed=[{','.join(changed)}] to go on all the same"
        )
    if state.get("batch") and (moved := [key for key in differing if key in POSITION]):
        raise UserError(
            f"checkpoint {path}: is {state['batch']} batches into an epoch, where {', '.join(pairs[k] for k in moved)} "
            "would repeat some images and skip others; go on from the end of an epoch"
        )
