"""What a run's folder says, for people: read only, whatever is missing."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distlenet.config import flatten, in_yaml
from distlenet.errors import UserError
from distlenet.tracking import TEST_FILE, Record
from distlenet.tracking.history import read_records


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it; parts that are not there are empty."""

    folder: Path
    settings: dict[str, str]  # dotted key: value as in YAML
    records: list[Record]
    summary: Record
    starts: list[Record]
    details: Record

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    def of(self, split: str) -> list[Record]:
        """Return the records of one split."""
        return [record for record in self.records if record["split"] == split]


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises UserError where it is none, or where a file in it cannot be read."""
    metrics, settings = folder / "metrics.jsonl", folder / "config.yaml"
    if not metrics.exists() or not settings.exists():
        raise UserError(f"{folder}: no run folder: no {metrics.name} and {settings.name} in it; give RUN_DIR/RUN_NAME")
    try:
        config = yaml.safe_load(settings.read_text(encoding="utf-8"))
        starts = list(_objects(_text(folder / "starts.jsonl")))
        summary = json.loads(_text(folder / "summary.json") or "{}")
        details = json.loads(_text(folder / TEST_FILE) or "{}")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder}: cannot be read: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(config, dict):
        raise UserError(f"{settings}: holds no settings")
    flat = {str(key): in_yaml(value) for key, value in flatten(config)}
    return Run(folder, flat, [record for _, record in read_records(metrics)], summary, starts, details)


def _objects(text: str) -> Iterator[Record]:
    """Read the lines that are whole; a power cut may have torn one."""
    for line in text.splitlines():
        with suppress(ValueError, RecursionError):
            if isinstance(start := json.loads(line), dict):
                yield start


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Return the settings that are not the same in all runs, each with its value in every run."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = [(key, [run.settings.get(key, "–") for run in runs]) for key in keys if key not in ("run.name", "run.dir")]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def class_accuracies(details: Record) -> list[tuple[str, float | None]]:
    """Return each class's name and the share of its images that are taken for it; None where it has none."""
    rows: list[tuple[str, float | None]] = []
    for label, (name, counts) in enumerate(zip(details["classes"], details["confusion"], strict=True)):
        rows.append((name, counts[label] / sum(counts) if sum(counts) else None))
    return rows


def column(records: list[Record], *keys: str) -> list[list[Any]]:
    """Return the values of ``keys``, of those records that have them all."""
    rows = [[record.get(key) for key in keys] for record in records]
    whole = [row for row in rows if None not in row]
    return [list(values) for values in zip(*whole, strict=True)] if whole else [[] for _ in keys]
