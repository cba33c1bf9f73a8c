"""``config.yaml``, ``metrics.jsonl`` and ``summary.json`` in the run directory."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from distlenet.tracking.base import Record, Tracker
from distlenet.utils.errors import UserError
from distlenet.utils.files import LineFile, convert_io_errors, replace_text


class History(Tracker):
    """Write the settings, append each record to ``metrics.jsonl`` as a line of JSON, and write the summary at the end.

    Numbers that are not finite become null. Raise UserError if a file cannot be written, except while training: then
    the lines of ``metrics.jsonl`` are kept in memory until they can be written.
    """

    def __init__(self, directory: Path, settings_yaml: str) -> None:
        """Write to ``directory``, which exists; ``settings_yaml`` is the content of ``config.yaml``."""
        self.directory, self.settings_yaml = directory, settings_yaml
        self.path, self.summary_path = directory / "metrics.jsonl", directory / "summary.json"
        self.lines: LineFile | None = None
        self.was_complete = False

    def start(self, run_info: Record) -> None:
        """Resume after step ``run_info["step"]``, and remove later records: those steps are trained again."""
        self.was_complete = run_info["complete"]
        with convert_io_errors(self.directory):
            kept = [
                line
                for line, record in read_records(self.path)
                if record["step"] <= run_info["step" if record["split"] == "train" else "evaluated"]
            ]  # a checkpoint may be older than the evaluation after its step
            replace_text(self.directory / "config.yaml", self.settings_yaml)
            replace_text(self.path, "".join(f"{line}\n" for line in kept))
            self.lines = LineFile(self.path)

    def log(self, record: Record) -> None:
        """Append one line."""
        assert self.lines is not None, "log before start"
        self.lines.add(to_json(record))

    def sync(self) -> None:
        """Flush all records to disk, so that no checkpoint outlives the records before it."""
        assert self.lines is not None, "sync before start"
        with convert_io_errors(self.directory):
            self.lines.sync()

    def finish(self, summary: Record) -> None:
        """Write ``summary.json``. A run that was complete at its start keeps the existing one, with its speed."""
        if self.was_complete and self.summary_path.exists():
            return
        assert self.lines is not None, "finish before start"
        self.lines.flush()
        self.sync()
        with convert_io_errors(self.directory):
            replace_text(self.summary_path, to_json(summary, indent=2) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self.lines is not None:
            self.lines.close()


def read_records(path: Path) -> Iterator[tuple[str, Record]]:
    """Yield each complete line of ``metrics.jsonl`` and its record. Raise UserError if a line is not a record."""
    content = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for number, line in enumerate(content.split("\n")[:-1], start=1):  # a kill may have cut the last line short
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not _is_record(record):
            raise UserError(f"{path}: line {number} is not a record: {line[:40]!r}; remove it")
        yield line, record


def _is_record(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("step"), int | float) and "split" in value


def to_json(record: Record, indent: int | None = None) -> str:
    """Convert a flat record to JSON, with null for numbers that are not finite."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, indent=indent, allow_nan=False)
