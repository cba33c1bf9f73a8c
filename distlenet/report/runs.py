"""Read a run directory for display. Missing parts are empty; nothing is written."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from distlenet.config.fields import flatten, to_yaml_value
from distlenet.config.reading import read_yaml
from distlenet.tracking.base import TEST_FILE, Record, metrics_of
from distlenet.tracking.history import read_records
from distlenet.utils.errors import UserError, one_line, printable, warn
from distlenet.utils.structure import MAX_COUNT, check_same_structure

T = TypeVar("T")

START: Record = {"time": "", "run_id": "", "step": 0, "world_size": 0, "host": "", "automatic": False}
MISTAKE: Record = {"index": 0, "label": 0, "predicted": 0, "confidence": 0.0, "png": ""}
IMAGE: Record = {"caption": "", "png": ""}
MAX_NAME = 40  # characters of the name of a class or of a metric that fit into a chart
MAX_METRICS = 20  # of a task, which a page shows


@dataclass(frozen=True)
class Run:
    """The contents of a run directory."""

    directory: Path
    settings: dict[str, str]  # dotted key: YAML value
    records: list[Record]
    summary: Record
    starts: list[Record]
    error_analysis: Record

    @property
    def name(self) -> str:
        """The name of the directory."""
        return printable(self.directory.resolve().name)

    @property
    def restarts(self) -> list[Record]:
        """The starts after the first one, without those of a run that was already complete."""
        last = self.records[-1]["step"] if self.records else 0
        return [start for start in self.starts[1:] if start["step"] < last]

    def of_split(self, split: str) -> list[Record]:
        """Return the records of one split."""
        return [record for record in self.records if record["split"] == split]


def read_run(directory: Path) -> Run:
    """Read a run directory. Raise UserError if it is not one, or its settings or records are not readable.

    Other damaged files are omitted with a warning.
    """
    metrics, settings = directory / "metrics.jsonl", directory / "config.yaml"
    if not metrics.is_file() or not settings.is_file():
        raise UserError(
            f"{directory}: is not a run directory: has no {metrics.name} or {settings.name}; give RUN_DIR/RUN_NAME"
        )
    config = read_yaml(str(settings), str(settings))
    try:
        records = [record for _, record in read_records(metrics)]
    except (OSError, ValueError, RecursionError) as error:
        reason = one_line(error)
        raise UserError(f"{metrics}: cannot be read: {reason}; restore the file, or omit the run") from error
    return Run(
        directory,
        {str(key): to_yaml_value(value) for key, value in flatten(config)},
        records,
        summary=_read_part(directory / "summary.json", lambda text: dict(json.loads(text).items()), {}),
        starts=_read_part(directory / "starts.jsonl", _parse_starts, []),
        error_analysis=_read_part(directory / TEST_FILE, _parse_error_analysis, {}),
    )


def _read_part(path: Path, parse: Callable[[str], T], empty: T) -> T:
    """Read and parse a file; return ``empty`` if it is missing or damaged."""
    if not path.exists():
        return empty
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"unexpected content: {str(error)[:200]}"
        warn(f"{path}: {reason}; the report omits it")
        return empty


def _parse_starts(text: str) -> list[Record]:
    """Parse the intact lines; a power failure may have damaged one."""
    starts = []
    for line in text.splitlines():
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            content = json.loads(line)
            start = {key: content[key] for key in START}
            check_same_structure(start, START, "start")
            time = datetime.strptime(start["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
            starts.append({**start, "timestamp": time.timestamp()})
    return starts


def _parse_error_analysis(text: str) -> Record:
    """Parse and check an error analysis. Raise ValueError, KeyError or TypeError if it is malformed.

    That of a user's task may consist of ``images`` only.
    """
    content = json.loads(text)
    if set(content) == {"images"}:
        check_same_structure(content, {"images": [IMAGE] * len(content["images"])}, "content")
        return {"images": [{**image, "caption": printable(image["caption"])} for image in content["images"]]}
    classes, mistakes = len(content["classes"]), len(content["mistakes"])
    expected = {"classes": [""] * classes, "confusion": [[0] * classes] * classes, "mistakes": [MISTAKE] * mistakes}
    check_same_structure(content, expected, "content")
    if not classes:
        raise ValueError("there are no classes")
    for mistake in content["mistakes"]:
        if max(mistake["label"], mistake["predicted"]) >= classes:
            raise ValueError(f"a mistake has a label beyond the {classes} classes")
    return {**content, "classes": [printable(name)[:MAX_NAME] for name in content["classes"]]}


def to_number(value: Any) -> float | None:
    """Return ``value`` if it is a number that a chart can show, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and -MAX_COUNT < value < MAX_COUNT
    return value if is_number else None


def columns(records: list[Record], *keys: str) -> list[list[Any]]:
    """Return one list of numbers per key, from the records that have a number for every key."""
    rows = [[to_number(record.get(key)) for key in keys] for record in records]
    complete = [row for row in rows if None not in row]
    return [list(values) for values in zip(*complete, strict=True)] if complete else [[] for _ in keys]


def metric_names(runs: list[Run]) -> list[str]:
    """Return the names of the metrics of the runs, besides the loss."""
    names = dict.fromkeys(name for run in runs for record in run.records for name in metrics_of(record))
    return [name for name in names if len(name) <= MAX_NAME and name.isprintable()][:MAX_METRICS]


def format_value(name: str, value: Any, form: str = "{:.4f}") -> str | None:
    """Format a number, and accuracies in percent; return None for anything else."""
    return None if to_number(value) is None else ("{:.2%}" if name == "accuracy" else form).format(value)


def key_figures(runs: list[Run]) -> list[tuple[str, list[str | None]]]:
    """Return the key figures: a name, and the value of each run; None for a value that a run does not have."""
    metrics = ["accuracy", "loss", *metric_names(runs)]
    figures = [dict(_figures(run, list(dict.fromkeys(metrics)))) for run in runs]
    return [(name, [each[name] for each in figures]) for name in figures[0]]


def _figures(run: Run, metrics: list[str]) -> list[tuple[str, str | None]]:
    test, val = ((run.of_split(split) or [{}])[-1] for split in ("test", "val"))
    train, summary = run.of_split("train"), run.summary
    speed = to_number(summary.get("train_images_per_s")) or (train[-1].get("images_per_s") if train else None)
    rows: list[tuple[str, Any, str]] = [
        ("epoch", test.get("epoch"), "{}"),
        ("step of best.pt", summary.get("best_step"), "{:,}"),
        ("optimizer steps", run.records[-1]["step"] if run.records else None, "{:,}"),
        ("samples/s", speed, "{:,.0f}"),
        ("seconds of training", summary.get("train_s"), "{:,.1f}"),
        ("ranks", run.starts[-1]["world_size"] if run.starts else None, "{}"),
        ("restarts", len(run.restarts) if run.starts else None, "{}"),
    ]
    return [
        *((f"test {name}", format_value(name, test.get(name))) for name in metrics),
        *((f"validation {name}", format_value(name, val.get(name))) for name in metrics),
        *((name, format_value(name, value, form)) for name, value, form in rows),
        ("state", "complete" if summary else "not complete"),
    ]


def differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Return the settings that differ between the runs, each with its value in every run."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = [(key, [run.settings.get(key, "–") for run in runs]) for key in keys if key not in ("run.name", "run.dir")]
    return [(key, values) for key, values in rows if len(set(values)) > 1]
