"""The format of one checkpoint file: what ``torch.save`` writes, with its own checksum inside.

``torch.save`` writes a ZIP archive, and an archive may end with a comment: there stands the SHA-256 of all bytes
before it. So the file and its checksum are replaced by one rename, and any reader of archives, ``torch.load`` first,
reads the file as ever.
"""

import contextlib
import hashlib
import io
import os
import tempfile
from pathlib import Path
from typing import Any, cast

import torch

from distlenet.utils.errors import UserError

State = dict[str, Any]

TEMP_PREFIX = ".writing-"  # how the names of temporary files begin
MARK = b"sha256:"
COMMENT_BYTES = len(MARK) + hashlib.sha256().digest_size * 2


class CheckpointError(UserError):
    """A checkpoint cannot be read, or is not what was written."""


def to_host(value: Any) -> Any:
    """Copy the tensors in nested dicts, lists and tuples to host memory, so that training cannot change them."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: to_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_host(item) for item in value)
    return value


def to_bytes(state: State) -> bytes:
    """Write a checkpoint, with its checksum, to memory."""
    content = io.BytesIO()
    torch.save(state, content)  # not into the file: on a full disk it would not raise an OSError
    archive = content.getvalue()
    # An archive's last two bytes are the length of its comment, which torch.save leaves empty.
    signed = archive[:-2] + COMMENT_BYTES.to_bytes(2, "little")
    return signed + _comment(signed)


def from_bytes(content: bytes) -> Any:
    """Read a checkpoint to CPU, with ``weights_only=True``: nothing in it is executed. Raises ValueError if damaged."""
    if content[-COMMENT_BYTES:] != _comment(content[:-COMMENT_BYTES]):
        raise ValueError("its bytes do not match its checksum")
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # what is no checkpoint makes torch.load raise almost anything
        raise ValueError("torch.load refuses it") from error


def _comment(content: bytes) -> bytes:
    return MARK + hashlib.sha256(content).hexdigest().encode()


def write_atomically(state: State, path: Path) -> None:
    """Write ``state`` so that ``path`` is, at every moment and after a power cut, the old file or the new.

    A temporary file in the same folder, fsync, rename, fsync of the folder. Raises OSError.
    """
    content = to_bytes(state)
    descriptor, temporary = tempfile.mkstemp(prefix=TEMP_PREFIX, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~UMASK)  # mkstemp makes files that only their owner reads
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


UMASK = _umask()  # read once, at import: to read it is to change it for a moment, for all threads


def load_checkpoint(path: Path) -> State:
    """Read a checkpoint to CPU. Raises CheckpointError where the file cannot be read or is not one of this package."""
    try:
        state = from_bytes(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(
            f"checkpoint {path}: is damaged or not a checkpoint of distlenet: {error}; give another, or remove it"
        ) from error
    whole = (
        isinstance(state, dict)
        and isinstance(model := state.get("model"), dict)
        and all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in model.items())
        and isinstance(state.get("config"), dict)
        and all(isinstance(state.get(name), int) and state[name] >= 0 for name in ("step", "epoch"))
    )
    if not whole:
        raise CheckpointError(f"checkpoint {path}: is not one of distlenet, which holds model, step, epoch and config")
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
