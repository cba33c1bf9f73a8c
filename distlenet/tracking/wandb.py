"""Weights & Biases: one W&B run per job, in which each line of ``metrics.jsonl`` is a row.

The row's number follows from the step and the split, so rows that W&B already has are recognized. Every row contains
its optimizer step, the x-axis of all charts. Source: https://docs.wandb.ai/models/ref/python
"""

import base64
import configparser
import io
import netrc
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from distlenet.tracking.base import SPLITS, Record
from distlenet.utils.errors import UserError, describe_error, warn

INIT_TIMEOUT_S = 30.0  # without WANDB_INIT_TIMEOUT: in which W&B must answer at the start, else the run is kept offline
MODES = {name: name for name in ("online", "offline", "disabled")} | {"dryrun": "offline", "run": "online"}
"""Values of WANDB_MODE; the last two are W&B's old names."""


def wandb_mode(mode: str, environ: Mapping[str, str]) -> str:
    """Resolve ``wandb.mode``: auto follows WANDB_MODE, else is online if a key is configured, else offline.

    Raise UserError if WANDB_MODE is invalid.
    """
    if mode != "auto":
        return mode
    if given := environ.get("WANDB_MODE", "").lower():
        if given not in MODES:
            raise UserError(f"WANDB_MODE={given}: expected online, offline or disabled; or give wandb.mode")
        return MODES[given]
    return "online" if has_key(environ) else "offline"


def has_key(environ: Mapping[str, str]) -> bool:
    """Return whether W&B's client finds an API key without a prompt: in the environment or in a netrc file."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    with suppress(OSError, RuntimeError, ValueError, netrc.NetrcParseError):  # no file, no home, an invalid address
        host = urlsplit(base_url(environ)).hostname or ""
        return bool(netrc.netrc(environ.get("NETRC") or _home(environ) / ".netrc").authenticators(host))
    return False


def base_url(environ: Mapping[str, str]) -> str:
    """Return the address of W&B's server: from the environment, or as ``wandb login --host`` saved it."""
    if given := environ.get("WANDB_BASE_URL"):
        return given
    saved = configparser.ConfigParser(interpolation=None)
    with suppress(OSError, RuntimeError, UnicodeDecodeError, configparser.Error):
        directory = environ.get("WANDB_CONFIG_DIR") or _home(environ) / ".config/wandb"
        saved.read(Path(directory) / "settings", encoding="utf-8")
    return saved.get("default", "base_url", fallback="https://api.wandb.ai")


def writable_directories(environ: Mapping[str, str], directory: Path) -> dict[str, str]:
    """Return variables that put the client's files under ``directory`` if the home directory cannot be written."""
    places = {"WANDB_DATA_DIR": ("XDG_DATA_HOME", ".local/share"), "WANDB_CACHE_DIR": ("XDG_CACHE_HOME", ".cache")}
    changed = {}
    for variable, (base, default) in places.items():
        default_directory = Path(environ.get(base) or _home(environ) / default)
        existing = next(path for path in (default_directory, *default_directory.parents) if path.exists())
        if not environ.get(variable) and not (existing.is_dir() and os.access(existing, os.W_OK)):
            changed[variable] = str(directory.absolute() / default.rpartition("/")[2].lstrip("."))
    return changed


def _home(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("HOME", "~")).expanduser()


class Wandb:
    """Send a run's records to W&B, or keep them in its offline format in ``RUN/wandb``."""

    def __init__(self, run_dir: Path, config: dict[str, Any], run_info: Record, mode: str) -> None:
        """Begin or resume the run ``run_info["run_id"]``. If that fails online, warn and keep the run offline."""
        import wandb

        self.wandb, self.run_dir, self.config, self.run_info = wandb, run_dir, config, run_info
        earlier = list((run_dir / "wandb").glob(f"offline-run-*-{run_info['run_id']}"))
        self.online = mode == "online"
        if self.online:
            try:
                self.run = self._init("online")
            except Exception as error:  # any: a wrong key, no network, an error of the server
                self.online = False
                warn(f"W&B: {describe_error(error)}; this run is kept offline, wandb sync sends it later")
                wandb.teardown()  # the rest of the failed start would keep the run's id
        if not self.online:
            self.run = self._init("offline")
        self.run.define_metric("step", hidden=True)
        for split in SPLITS:
            self.run.define_metric(f"{split}/*", step_metric="step")
        self.next_row = self.run.step  # W&B has the rows before; offline, 0
        self.replaced = [path for path in earlier if not list(path.glob("*.synced"))]
        self.last: Record | None = None

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        settings = self.wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True)
        if not os.environ.get("WANDB_INIT_TIMEOUT"):  # which W&B reads
            settings.init_timeout = INIT_TIMEOUT_S
        replayed = "hosts" not in self.run_info  # on another machine, perhaps: its environment is not the run's
        return self.wandb.init(
            mode=mode,
            id=self.run_info["run_id"],
            resume="allow",
            name=self.run_dir.name,
            dir=str(self.run_dir),
            config=self.config if replayed else {**self.config, "environment": environment(self.run_info)},
            settings=settings,
            **{key: self.config["wandb"][key] or None for key in ("project", "entity", "group", "tags", "notes")},
        )

    def put(self, record: Record) -> None:
        """Send one record, unless W&B has it."""
        number = row_number(record)
        self.last = record
        if number >= self.next_row:
            self.run.log(row(record), step=number)
            self.next_row = number + 1

    def flush(self) -> None:
        """Do nothing: W&B's own process has the records."""

    def mark_replayed(self) -> None:
        """Remove the offline files of earlier starts: this one has all of their records."""
        for path in self.replaced:
            shutil.rmtree(path, ignore_errors=True)
        self.replaced = []

    def finish(self, outcome: str, summary: Record, details: Record) -> None:
        """End the run; ``outcome`` is finished, preempted or failed."""
        if outcome == "finished":
            if details and self.last is not None and self.next_row == row_number(self.last) + 1:
                try:
                    self.run.log({"step": self.last["step"], **self._tables(details)}, step=self.next_row)
                except Exception as error:  # any: the numbers are more important than the tables
                    warn(f"W&B: {describe_error(error)}; this run has no tables there, report.html has them")
            self.run.summary.update({k: v for k, v in summary.items() if v is not None})
            kind = "best" if "best_step" in summary else "last"  # without a validation set, there is no best one
            path = self.run_dir / "checkpoints" / f"{kind}.pt"
            if self.config["wandb"]["log_checkpoints"] and path.exists():
                self.run.log_artifact(str(path), name=f"{self.run_dir.name}-{kind}", type="model")
        elif outcome == "preempted":
            self.run.mark_preempting()
        self.run.finish(exit_code=0 if outcome == "finished" else 1)

    def _tables(self, details: Record) -> dict[str, Any]:
        """Return the confusion matrix, and a table of the mistakes with their images."""
        from PIL import Image

        classes, labels, predictions = details["classes"], [], []
        for label, counts in enumerate(details["confusion"]):
            for predicted, count in enumerate(counts):
                labels += [label] * count
                predictions += [predicted] * count
        confusion = self.wandb.plot.confusion_matrix(
            y_true=labels, preds=predictions, class_names=classes, title="Test set"
        )
        mistakes = self.wandb.Table(columns=["image", "label", "predicted", "confidence", "index"])
        for mistake in details["mistakes"]:
            image = self.wandb.Image(Image.open(io.BytesIO(base64.b64decode(mistake["png"]))))
            label, predicted = classes[mistake["label"]], classes[mistake["predicted"]]
            mistakes.add_data(image, label, predicted, mistake["confidence"], mistake["index"])
        return {"test/confusion_matrix": confusion, "test/most_confident_mistakes": mistakes}


def row_number(record: Record) -> int:
    """Return the row of a record. Each step has a row for each split, and one for the tables."""
    return (len(SPLITS) + 1) * int(record["step"]) + SPLITS.index(record["split"])


def row(record: Record) -> Record:
    """Return a record as W&B's row: keys like ``train/loss``, without null values."""
    values = {k: v for k, v in record.items() if k not in ("split", "step", "epoch", "time") and v is not None}
    return {"step": record["step"], "epoch": record["epoch"]} | {f"{record['split']}/{k}": v for k, v in values.items()}


def environment(run_info: Record) -> Record:
    """Return the hosts, device, versions and SLURM job id of a run. No secrets."""
    info = {key: run_info[key] for key in ("world_size", "backend", "device", "precision")}
    info |= {"hosts": sorted(set(run_info["hosts"])), "slurm_job_id": os.environ.get("SLURM_JOB_ID")}
    packages = {f"{package}_version": version(package) for package in ("torch", "torchvision", "wandb")}
    return info | packages | {"distlenet_version": run_info["version"]}
