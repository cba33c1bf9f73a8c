"""What a run's folder says, for people: read only, whatever is missing."""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from distlenet.config.fields import flatten, to_yaml_value
from distlenet.config.loading import read_yaml
from distlenet.tracking.base import TEST_FILE, Record
from distlenet.tracking.history import read_records
from distlenet.utils.errors import UserError, printable, warn
from distlenet.utils.structure import MOST, check_same_structure

T = TypeVar("T")


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
        return printable(self.folder.resolve().name)

    @property
    def restarts(self) -> list[Record]:
        """The starts after the first that trained on; that of a run which is complete only looks."""
        last = self.records[-1]["step"] if self.records else 0
        return [start for start in self.starts[1:] if start["step"] < last]

    def of(self, split: str) -> list[Record]:
        """Return the records of one split."""
        return [record for record in self.records if record["split"] == split]


START: Record = {"time": "", "run_id": "", "step": 0, "world_size": 0, "host": "", "automatic": False}
MISTAKE: Record = {"index": 0, "label": 0, "predicted": 0, "confidence": 0.0, "png": ""}
LONGEST_NAME = 40
"""Letters of a class's name for which charts have room."""


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises UserError where it is none, or where its settings or records cannot be read.

    Of the other files, what is not as a run writes it is left out, with a warning.
    """
    metrics, settings = folder / "metrics.jsonl", folder / "config.yaml"
    if not metrics.is_file() or not settings.is_file():
        raise UserError(
            f"{folder}: is not a run folder: has no {metrics.name} or no {settings.name}; give RUN_DIR/RUN_NAME"
        )
    config = read_yaml(str(settings), str(settings))
    try:
        records = [record for _, record in read_records(metrics)]
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{metrics}: cannot be read: {reason}; restore that file, or leave the run out") from error
    flat = {str(key): to_yaml_value(value) for key, value in flatten(config)}
    starts = list(_starts(_part(folder / "starts.jsonl", str, "")))
    summary: Record = _part(folder / "summary.json", lambda text: dict(json.loads(text).items()), {})
    details: Record = _part(folder / TEST_FILE, lambda text: _details(json.loads(text)), {})
    return Run(folder, flat, records, summary, starts, details)


def _part(path: Path, read: Callable[[str], T], empty: T) -> T:
    """Read a part of a run; where it is not there, or damaged, it is ``empty``."""
    if not path.exists():
        return empty
    try:
        return read(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not as a run writes it: {str(error)[:200]}"
        warn(f"{path}: {reason}; the report leaves it out")
        return empty


def _starts(text: str) -> Iterator[Record]:
    """Read the lines that are whole; a power cut may have torn one."""
    for line in text.splitlines():
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            found = json.loads(line)
            start = {key: found[key] for key in START}
            check_same_structure(start, START, "start")
            at = datetime.strptime(start["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
            yield {**start, "at": at.timestamp()}


def _details(content: Record) -> Record:
    """Check what a test's details are. Raises ValueError, KeyError or TypeError where they are not."""
    classes, mistakes = len(content["classes"]), len(content["mistakes"])
    like = {"classes": [""] * classes, "confusion": [[0] * classes] * classes, "mistakes": [MISTAKE] * mistakes}
    check_same_structure(content, like, "it")
    if not classes:
        raise ValueError("it names no class")
    for mistake in content["mistakes"]:
        if max(mistake["label"], mistake["predicted"]) >= classes:
            raise ValueError(f"a mistake is of none of the {classes} classes")
    return {**content, "classes": [printable(name)[:LONGEST_NAME] for name in content["classes"]]}


def number(value: Any) -> float | None:
    """Return a value that can be drawn; None where it is none."""
    drawn = isinstance(value, int | float) and not isinstance(value, bool) and -MOST < value < MOST
    return value if drawn else None


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
    """Return the numbers of ``keys``, of those records that have them all."""
    rows = [[number(record.get(key)) for key in keys] for record in records]
    whole = [row for row in rows if None not in row]
    return [list(values) for values in zip(*whole, strict=True)] if whole else [[] for _ in keys]
