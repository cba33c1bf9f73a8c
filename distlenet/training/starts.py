"""The starts of a run: its id, and how often it was started without progress."""

import contextlib
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from distlenet.distributed.environment import number
from distlenet.utils.errors import UserError
from distlenet.utils.files import LineFile, told

RUN_ID = re.compile(r"[0-9a-z]{8}")
"""What names a run among trackers."""


def process_age_s() -> float:
    """Return the seconds since this process was started, its imports among them (proc(5): field 22 of stat)."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def is_restart(environ: Mapping[str, str] = os.environ) -> bool:
    """Say whether torchrun or SLURM has by itself started this process again."""
    counts = [name for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT") if environ.get(name)]
    return any(number(environ, name) > 0 for name in counts)


def run_id(run: Path, saved: str, settings: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return the id of a run: the ``saved`` one, or that of a start that left no checkpoint, or a new one.

    Only torchrun or SLURM goes on with a start that left none, and only with the same ``settings`` (see
    ``config.identity``): a person may have changed anything since, and trackers would show both as one.
    """
    path = run / "starts.jsonl"
    if not saved and is_restart(environ) and path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                start = json.loads(line)
                found = str(start["run_id"])
                saved = found if start["settings"] == settings and RUN_ID.fullmatch(found) else ""
    return saved or secrets.token_hex(4)


def record_start(
    run: Path,
    step: int,
    world_size: int,
    limit: int,
    run_id: str = "",
    settings: str = "",
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Note in ``starts.jsonl`` that a run starts on ``world_size`` ranks, after ``step`` steps. For rank 0 alone.

    ``settings`` are the result-changing ones (see ``config.identity``). Raises UserError where torchrun or SLURM has by
    itself started it ``limit`` times in a row at the same step, and it would be the next: what ends it there would end
    it again.
    """
    path = run / "starts.jsonl"
    automatic = is_restart(environ)
    in_vain = 0
    if automatic and path.exists():
        for line in reversed(path.read_text(encoding="utf-8", errors="replace").splitlines()):
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):  # a line that a power cut tore
                start = json.loads(line)
                if start["step"] != step or not start["automatic"]:
                    break
                in_vain += 1
    if in_vain >= limit:
        raise UserError(
            f"run {run}: restarted {in_vain} times from step {step} and never reached the next checkpoint "
            f"(checkpoint.max_restarts_without_progress={limit}); look at {run / 'logs'} for what ends it, then start it by hand"
        )
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    facts = {
        "time": now,
        "run_id": run_id,
        "settings": settings,
        "step": step,
        "world_size": world_size,
        "host": socket.gethostname(),
        "automatic": automatic,
    }
    with told(run):
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        file = LineFile(path)
    if torn:  # by a power cut: what is left of that line stays alone
        file.add("")
    file.add(json.dumps(facts))
    file.close()
