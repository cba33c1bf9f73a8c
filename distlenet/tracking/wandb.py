"""Weights & Biases: one run per job, in which each line of ``metrics.jsonl`` is a row.

A row's number is made from the optimizer step and the kind of record, so a row that W&B has already is known. Each
has its optimizer step in it, the axis of all charts. Source: https://docs.wandb.ai/models/ref/python
"""

import base64
import configparser
import io
import netrc
import os
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from distlenet.tracking.base import SPLITS, Record
from distlenet.utils.errors import UserError, warn

INIT_S = 30.0
"""Seconds that W&B has to answer at the start, before the run is kept offline."""


MODES = {name: name for name in ("online", "offline", "disabled")} | {"dryrun": "offline", "run": "online"}
"""What WANDB_MODE says; the last two are W&B's older words."""


def wandb_mode(mode: str, environ: Mapping[str, str]) -> str:
    """Resolve ``wandb.mode``: auto follows WANDB_MODE, else is online where a key is configured, else offline.

    Raises UserError for a WANDB_MODE that says nothing.
    """
    if mode != "auto":
        return mode
    if given := environ.get("WANDB_MODE", "").lower():
        if given not in MODES:
            raise UserError(f"WANDB_MODE={given}: expected online, offline or disabled; or give wandb.mode")
        return MODES[given]
    return "online" if has_key(environ) else "offline"


def has_key(environ: Mapping[str, str]) -> bool:
    """Say whether W&B's client will find a key without asking: in the environment or in a netrc file."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    places: list[str | Path | None] = [environ.get("NETRC")]
    with suppress(RuntimeError):  # a user without a home
        home = Path(environ.get("HOME", "~")).expanduser()
        places += [home / ".netrc", home / "_netrc"]
    for path in places:
        with suppress(OSError, ValueError, netrc.NetrcParseError):  # a file or an address that is none
            if path and netrc.netrc(path).authenticators(urlsplit(base_url(environ)).hostname or ""):
                return True
    return False


def base_url(environ: Mapping[str, str]) -> str:
    """Return the address of W&B's server: from the environment, or where ``wandb login --host`` wrote it."""
    if given := environ.get("WANDB_BASE_URL"):
        return given
    written = configparser.ConfigParser(interpolation=None)
    with suppress(OSError, RuntimeError, UnicodeDecodeError, configparser.Error):
        home = Path(environ.get("HOME", "~")).expanduser()
        written.read(Path(environ.get("WANDB_CONFIG_DIR") or home / ".config/wandb") / "settings", encoding="utf-8")
    return written.get("default", "base_url", fallback="https://api.wandb.ai")


class Wandb:
    """Sends a run's records to W&B, or keeps them in its offline format below ``RUN/wandb``."""

    def __init__(self, folder: Path, config: dict[str, Any], run_info: Record, mode: str) -> None:
        """Begin or continue the run ``run_info["run_id"]``. What fails online is kept offline, and said once."""
        import wandb

        self.wandb, self.folder, self.settings = wandb, folder, config["wandb"]
        before = set((folder / "wandb").glob(f"offline-run-*-{run_info['run_id']}"))
        self.run: Any = None
        self.online = False
        if mode == "online":
            try:
                self.run = self._init(config, run_info, "online")
                self.online = True
            except Exception as error:  # whatever it is: a wrong key, no network, a server's mistake
                warn(f"W&B: {in_a_line(error)}; this run is kept offline, wandb sync sends it later")
                wandb.teardown()  # else what is left of the failed start holds the run's id
        if self.run is None:
            self.run = self._init(config, run_info, "offline")
        self.run.define_metric("step", hidden=True)
        for split in SPLITS:
            self.run.define_metric(f"{split}/*", step_metric="step")
        self.next_row = self.run.step  # W&B has the rows before; offline it has none
        self.stale = [path for path in before if not list(path.glob("*.synced"))]
        self.last: Record | None = None

    def _init(self, config: dict[str, Any], run_info: Record, mode: Literal["online", "offline"]) -> Any:
        given = self.settings
        return self.wandb.init(
            mode=mode,
            id=run_info["run_id"],
            resume="allow",
            name=self.folder.name,
            project=given["project"],
            entity=given["entity"],
            group=given["group"],
            tags=given["tags"],
            notes=given["notes"],
            dir=str(self.folder),
            config={**config, "environment": environment(run_info)},
            settings=self.wandb.Settings(
                silent=True, console="off", disable_git=True, disable_code=True, init_timeout=INIT_S
            ),
        )

    def put(self, record: Record) -> None:
        """Send one record, unless W&B has it."""
        number = row_number(record)
        self.last = record
        if number >= self.next_row:
            self.run.log(row(record), step=number)
            self.next_row = number + 1

    def mark_replayed(self) -> None:
        """All that was recorded before this start is sent: offline files that hold parts of it are not needed."""
        for path in self.stale:
            shutil.rmtree(path, ignore_errors=True)
        self.stale = []

    def finish(self, outcome: str, summary: Record, details: Record | None) -> None:
        """End the run; ``outcome`` is finished, preempted or failed."""
        if outcome == "finished":
            if details is not None and self.last is not None and self.next_row == row_number(self.last) + 1:
                try:
                    tables = self._tables(details)
                    self.run.log({"step": self.last["step"], **tables}, step=self.next_row)
                except Exception as error:  # the numbers are worth more than the pictures
                    warn(f"W&B: {in_a_line(error)}; this run has no tables there, report.html has them")
            self.run.summary.update({k: v for k, v in summary.items() if v is not None})
            best = self.folder / "checkpoints" / "best.pt"
            if self.settings["log_checkpoints"] and best.exists():
                artifact = self.wandb.Artifact(f"{self.folder.name}-best", type="model")
                artifact.add_file(str(best))
                self.run.log_artifact(artifact)
        elif outcome == "preempted":
            self.run.mark_preempting()
        self.run.finish(exit_code=0 if outcome == "finished" else 1)

    def _tables(self, details: Record) -> dict[str, Any]:
        from PIL import Image

        wandb, names = self.wandb, details["classes"]
        cells = [
            [names[label], names[predicted], count]
            for label, counts in enumerate(details["confusion"])
            for predicted, count in enumerate(counts)
        ]
        columns = ["Actual", "Predicted", "nPredictions"]
        mistakes = wandb.Table(columns=["image", "label", "predicted", "confidence", "index"])
        for found in details["mistakes"]:
            picture = wandb.Image(Image.open(io.BytesIO(base64.b64decode(found["png"]))))
            label, predicted = names[found["label"]], names[found["predicted"]]
            mistakes.add_data(picture, label, predicted, found["confidence"], found["index"])
        confusion = wandb.plot_table(
            "wandb/confusion_matrix/v1",
            wandb.Table(columns=columns, data=cells),
            {name: name for name in columns},
            {"title": "Test set"},
        )
        return {"test/confusion_matrix": confusion, "test/surest_mistakes": mistakes}


def in_a_line(error: Exception) -> str:
    """Say what went wrong."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def row_number(record: Record) -> int:
    """Number a record: those of one step in the order of ``SPLITS``, then one of pictures."""
    return (len(SPLITS) + 1) * int(record["step"]) + SPLITS.index(record["split"])


def row(record: Record) -> Record:
    """Write a record as W&B's row: ``train/loss`` and so on, without what is null."""
    axis = {key: record[key] for key in ("step", "epoch")}
    rest = {k: v for k, v in record.items() if k not in ("split", "step", "epoch", "time") and v is not None}
    return {**axis, **{f"{record['split']}/{key}": value for key, value in rest.items()}}


def environment(run_info: Record) -> Record:
    """Say where a run computes and with what: hosts, device, versions, git commit, SLURM's job id. No secrets."""
    found: Record = {key: run_info[key] for key in ("world_size", "backend", "device", "precision") if key in run_info}
    found["hosts"] = sorted(set(run_info.get("hosts", [])))
    for package in ("distlenet", "torch", "torchvision", "wandb"):
        with suppress(PackageNotFoundError):
            found[f"{package}_version"] = version(package)
    with suppress(OSError, subprocess.SubprocessError):
        asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=True)
        found["git_commit"] = answer.stdout.strip()
    if job := os.environ.get("SLURM_JOB_ID"):
        found["slurm_job_id"] = job
    return found
