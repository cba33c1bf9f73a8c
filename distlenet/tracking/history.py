"""``config.yaml``, ``metrics.jsonl`` and ``summary.json``: the run's own record of itself."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from distlenet.tracking.base import Record
from distlenet.utils.errors import UserError
from distlenet.utils.files import LineFile, replace_text, told


class History:
    """Keep the settings, append each record to ``metrics.jsonl``, one JSON object a line, and a summary at the end.

    Numbers that are not finite are null: JSON has none. Raises UserError where a file cannot be written, but for
    ``metrics.jsonl`` on the way: its lines wait for the disk in memory.
    """

    def __init__(self, folder: Path, settings: str) -> None:
        """Write into ``folder``, which exists; ``settings`` is what ``config.yaml`` is to hold."""
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        self.summary_path = folder / "summary.json"
        self.settings = settings
        self.lines: LineFile | None = None
        self.complete = False

    def start(self, run_info: Record) -> None:
        """Go on after step ``run_info["step"]``: what an interrupted run wrote beyond it is cut off.

        Those steps are trained and recorded again, so the history has each step once.
        """
        self.complete = run_info["complete"]
        with told(self.folder):
            kept = [line for line, record in read_records(self.path) if self._belongs(record, run_info)]
            replace_text(self.folder / "config.yaml", self.settings)
            replace_text(self.path, "".join(f"{line}\n" for line in kept))
            self.lines = LineFile(self.path)

    def log(self, record: Record) -> None:
        """Append one line."""
        assert self.lines is not None, "log before start"
        self.lines.add(to_json(record))

    def sync(self) -> None:
        """Have all records on the disk, so that no checkpoint outlives the records before it."""
        if self.lines is not None:
            with told(self.folder):
                self.lines.sync()

    def finish(self, summary: Record) -> None:
        """Write ``summary.json``; a run that was complete before keeps the one that measured its training."""
        if self.complete and self.summary_path.exists():
            return
        if self.lines is not None:
            self.lines.flush()
        self.sync()
        with told(self.folder):
            replace_text(self.summary_path, to_json(summary, indent=2) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self.lines is not None:
            self.lines.close()

    @staticmethod
    def _belongs(record: Record, run_info: Record) -> bool:
        """Say whether a record is of what the checkpoint holds; after its step it may not have been evaluated yet."""
        last = run_info["step"] if record["split"] == "train" else run_info["evaluated"]
        return bool(record["step"] <= last)


def read_records(path: Path) -> Iterator[tuple[str, Record]]:
    """Yield the whole lines of ``metrics.jsonl`` and what they say; a last one without its end was cut by a kill.

    Raises UserError for a line that is no record.
    """
    if not path.exists():
        return
    content = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            continue
        try:
            record = json.loads(line)
            record["step"] + 0, record["split"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is no record: {line[:40]!r}; remove it") from error
        yield line[:-1], record


def to_json(record: Record, indent: int | None = None) -> str:
    """Write a flat record as JSON, with null for numbers that are not finite."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, indent=indent, allow_nan=False)
