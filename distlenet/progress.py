"""How far a run has come, and how often it was started."""

import contextlib
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from distlenet.checkpoint.alike import check_alike
from distlenet.errors import UserError
from distlenet.files import LineFile, told
from distlenet.metrics import Metrics
from distlenet.tracking import Record
from distlenet.world import number

RUN_ID = re.compile(r"[0-9a-z]{8}")
"""What names a run among trackers."""


@dataclass
class Progress:
    """Where a run stands; part of every checkpoint, as plain values."""

    step: int = 0  # optimizer steps done, over all epochs
    epoch: int = 0  # epochs done
    batch: int = 0  # global batches done in the epoch under way
    lr: float = 0.0  # of the last step
    evaluated: int = 0  # the step after which the last evaluation was made
    test: Record = field(default_factory=dict)  # its metrics
    best_accuracy: float = -1.0
    skipped: int = 0  # steps that were not taken, since not finite
    restarts: int = 0  # how often the run went on from a checkpoint
    micro_batch: int = 0  # images of a rank's micro-batch when the run began
    started_from: str | None = None  # the checkpoint.resume=PATH it began with
    run_id: str = ""  # the run's name among trackers, of 8 letters and digits

    def take_test(self, metrics: Metrics) -> bool:
        """Note an evaluation after the present step; return whether it is the best yet."""
        self.evaluated = self.step
        self.test = metrics.named("test")
        best = metrics.accuracy > self.best_accuracy
        self.best_accuracy = max(metrics.accuracy, self.best_accuracy)
        return best

    def state_dict(self) -> dict[str, Any]:
        """Return all values."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up saved values. Raises KeyError where one is missing, ValueError where one cannot be."""
        like = asdict(Progress()) | {"test": Metrics(0.0, 0.0, 0).named("test") if state["test"] else {}}
        check_alike({name: state[name] for name in like}, like, "progress")
        if state["run_id"] and not RUN_ID.fullmatch(state["run_id"]):  # it names a folder
            raise ValueError(f"run_id {state['run_id']!r}: expected 8 letters and digits")
        for each in fields(self):
            setattr(self, each.name, state[each.name])


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
            f"(checkpoint.restarts_in_vain={limit}); look at {run / 'logs'} for what ends it, then start it by hand"
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
