"""What a rank reports to torchrun's agent, in files: each rank of a node has a directory.

This module imports only the standard library: entry points use it before they import torch, which takes seconds.
"""

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # of this rank; its name is the same for all ranks
NO_RESTARTS_FILE = "DISTLENET_NO_RESTARTS_FILE"  # which a rank writes, see ``forbid_restarts``


def record_failure(text: str) -> None:
    """Give torchrun the reason why this rank fails: its report then contains it. Without torchrun, do nothing.

    torch's ``record`` would write a traceback also for an error of the user.
    """
    if path := os.environ.get(ERROR_FILE):
        details = {"py_callstack": text, "timestamp": str(int(time.time()))}  # what torchrun reads
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": details}}))


def read_failure(path: Path) -> str | None:
    """Return what a rank has recorded in ``path``, or None if there is nothing."""
    try:
        text: str = json.loads(path.read_text())["message"]["message"]
    except (OSError, ValueError):  # killed before or while it wrote
        return None
    return text


def rank_has_failed(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether a rank of this node has recorded a failure, which is then the last line on the screen."""
    path = environ.get(ERROR_FILE)
    return path is not None and any(Path(path).parent.parent.glob(f"*/{Path(path).name}"))


def forbid_restarts() -> bool:
    """Record for ``python -m distlenet.launch`` that a rank ends it because all ranks would fail again.

    Return False if another rank of this node has done so: a second signal would interrupt the cleanup of the agent.
    """
    with contextlib.suppress(OSError, KeyError):
        try:
            Path(os.environ[NO_RESTARTS_FILE]).touch(exist_ok=False)
        except FileExistsError:
            return False
    return True


def restarts_are_forbidden() -> bool:
    """Return whether a rank has called ``forbid_restarts``."""
    return Path(os.environ[NO_RESTARTS_FILE]).exists()
