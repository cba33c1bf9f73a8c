"""Is the run folder one for all nodes, writable on each, and large enough? Is the data on each node?"""

import contextlib
import shutil
import time
from contextlib import closing
from pathlib import Path

import torch

from distlenet.checkpoint.format import to_bytes
from distlenet.config.schema import Config
from distlenet.data.sources import open_data, require_local_data
from distlenet.models.registry import make_model
from distlenet.training.optimizers import make_optimizer
from distlenet.utils.errors import UserError

MADE: set[Path] = set()
"""Folders that this process has made, and takes away again."""

SEEN_S = 5.0
"""Seconds after which a file written on one node is seen on another: NFS keeps listings that long or so."""


def token(config: Config, word: str, node: int) -> Path:
    """Name the file by which a node shows the others that it writes to the same folder."""
    return Path(config.run.dir) / f".preflight-{word}-{node}"


def write_token(config: Config, word: str, node: int) -> str:
    """Write this node's file; return why that cannot be, or nothing."""
    path = token(config, word, node)
    try:
        if node == 0 and not path.parent.exists():
            path.parent.mkdir(parents=True)
            MADE.add(path.parent)
        path.write_text(word)
    except OSError as error:
        return f"{path.parent} cannot be written: {error.strerror or error}"
    return ""


def sees_token(config: Config, word: str, node: int) -> bool:
    """Wait a while for the file of another node."""
    deadline = time.monotonic() + SEEN_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            return token(config, word, node).read_text() == word
        time.sleep(0.1)
    return False


def remove_token(config: Config, word: str, node: int) -> None:
    """Take this node's file away, and the folder, where it was made for it and nothing else is in it."""
    with contextlib.suppress(OSError):
        token(config, word, node).unlink()
    remove_made(config)


def remove_made(config: Config) -> None:
    """Remove the run folder's parent where it was made for a look, and is empty."""
    if (folder := Path(config.run.dir)) in MADE:
        with contextlib.suppress(OSError):
            folder.rmdir()


def room(config: Config) -> str:
    """Say, on one node, why the checkpoints that are kept would not fit; nothing, where they do."""
    size = checkpoint_bytes(config)
    needed = (config.checkpoint.keep_last + 2) * size  # the newest K, the best, and the one being written
    free = shutil.disk_usage(config.run.dir).free
    if free < needed:
        return (
            f"{config.run.dir} has {free / 10**6:,.1f} MB free, {config.checkpoint.keep_last + 2} checkpoints take "
            f"{needed / 10**6:,.1f} MB"
        )
    return ""


def checkpoint_bytes(config: Config) -> int:
    """Return the size of a checkpoint, but for some thousand bytes of settings and progress."""
    net = make_model(config.model.name, config.model.channels_last, torch.device("cpu"))
    optimizer = make_optimizer(config.optim, net)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes its state
    return len(to_bytes({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "config": config.to_dict()}))


def data_here(config: Config) -> tuple[str, str]:
    """Open and verify the data set as training does; return (where it is, why it cannot be used)."""
    try:
        require_local_data(config.data)
        with closing(open_data(config.data)) as opened:
            return opened.source, ""
    except UserError as error:
        return "", str(error)
