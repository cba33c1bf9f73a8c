"""The starts of a run: its id, and how often it restarted without progress."""

import contextlib
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distlenet.distributed.environment import read_int
from distlenet.utils.errors import UserError
from distlenet.utils.files import LineFile, convert_io_errors

RUN_ID = re.compile(r"[0-9a-z]{8}")
"""The format of a run's id."""

STARTS_FILE = "starts.jsonl"
RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"


def process_age_s() -> float:
    """Return the seconds since this process started, its imports included (proc(5): field 22 of stat)."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def is_restart(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun or SLURM restarted this process automatically."""
    counts = [name for name in (RESTART_COUNT, "SLURM_RESTART_COUNT") if environ.get(name)]
    return any(read_int(environ, name) > 0 for name in counts)


def describe_restart(environ: Mapping[str, str] = os.environ) -> str:
    """Return which of torchrun's restarts this is; an empty string for the first start."""
    count = read_int(environ, RESTART_COUNT) if environ.get(RESTART_COUNT) else 0
    return f"restart {count} of {environ.get('TORCHELASTIC_MAX_RESTARTS', '?')}" if count else ""


def count_starts(run_dir: Path) -> int:
    """Return how often the run has started so far."""
    return sum(1 for _ in _read_starts(run_dir))


def choose_run_id(run_dir: Path, saved: str, settings: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return the id of a run: the ``saved`` one, or that of a start without a checkpoint, or a new one.

    A new run of a sweep of W&B has the id that the sweep's agent gives it: W&B accepts no other.

    A start without a checkpoint is continued by the next one if ``settings`` is the same text, which identifies the
    settings, the data and the user's code: otherwise, W&B would show two different runs as one.
    """
    if not saved and environ.get("WANDB_SWEEP_ID") and RUN_ID.fullmatch(environ.get("WANDB_RUN_ID", "")):
        return environ["WANDB_RUN_ID"]
    if not saved:
        for start in _read_starts(run_dir):
            with contextlib.suppress(TypeError, KeyError):
                run_id = str(start["run_id"])
                saved = run_id if start["settings"] == settings and RUN_ID.fullmatch(run_id) else ""
    return saved or secrets.token_hex(4)


def record_start(
    run_dir: Path,
    step: int,
    world_size: int,
    limit: int,
    run_id: str,
    settings: str,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Append to ``starts.jsonl`` that a run starts on ``world_size`` ranks, after ``step`` steps. Rank 0 only.

    ``settings`` is as in ``choose_run_id``. Raise UserError if this would be more than ``limit`` automatic restarts in
    a row at the same step: whatever ended them would end this one too.
    """
    automatic = is_restart(environ)
    without_progress = 0
    for start in reversed(list(_read_starts(run_dir)) if automatic else []):
        with contextlib.suppress(TypeError, KeyError):
            if start["step"] != step or not start["automatic"]:
                break
            without_progress += 1
    if without_progress >= limit:
        raise UserError(
            f"run {run_dir}: restarted {without_progress} times from step {step} and never reached the next checkpoint "
            f"(checkpoint.max_restarts_without_progress={limit}); see {run_dir / 'logs'} for the cause, then start it "
            "by hand"
        )
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "run_id": run_id,
        "settings": settings,
        "step": step,
        "world_size": world_size,
        "host": socket.gethostname(),
        "automatic": automatic,
    }
    path = run_dir / STARTS_FILE
    with convert_io_errors(run_dir):
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        file = LineFile(path)
    if torn:  # by a power cut: the rest of that line stays on its own line
        file.add("")
    file.add(json.dumps(start))
    file.close()


def _read_starts(run_dir: Path) -> Iterator[Any]:
    """Yield the starts so far, without lines that a power cut tore."""
    path = run_dir / STARTS_FILE
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                yield json.loads(line)
