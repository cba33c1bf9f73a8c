"""``config.yaml``, ``metrics.jsonl`` and ``summary.json``: the run's own record of itself."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from distlenet.errors import UserError
from distlenet.tracking import Record


class History:
    """Keep the settings, append each record to ``metrics.jsonl``, one JSON object a line, and a summary at the end.

    Numbers that are not finite are null: JSON has none. Raises UserError where a file cannot be written.
    """

    def __init__(self, folder: Path, settings: str) -> None:
        """Write into ``folder``, which exists; ``settings`` is what ``config.yaml`` is to hold."""
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        self.summary_path = folder / "summary.json"
        self.settings = settings
        self.file: TextIO | None = None
        self.complete = False

    def start(self, facts: Record) -> None:
        """Go on after step ``facts["step"]``: what an interrupted run wrote beyond it is cut off.

        Those steps are trained and recorded again, so the history has each step once.
        """
        self.complete = facts["step"] >= facts["steps"]
        with _told(self.folder):
            kept = [line for line, record in self._lines() if record["step"] <= facts["step"]]
            replace_text(self.folder / "config.yaml", self.settings)
            replace_text(self.path, "".join(f"{line}\n" for line in kept))
            self.file = self.path.open("a", encoding="utf-8", buffering=1)

    def log(self, record: Record) -> None:
        """Append one line."""
        assert self.file is not None, "log before start"
        with _told(self.folder):
            self.file.write(to_json(record) + "\n")

    def sync(self) -> None:
        """Have all records on the disk, so that no checkpoint outlives the records before it."""
        if self.file is not None:
            with _told(self.folder):
                os.fsync(self.file.fileno())

    def finish(self, summary: Record) -> None:
        """Write ``summary.json``; a run that was complete before keeps the one that measured its training."""
        if self.complete and self.summary_path.exists():
            return
        with _told(self.folder):
            replace_text(self.summary_path, to_json(summary, indent=2) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()

    def _lines(self) -> Iterator[tuple[str, Record]]:
        """Yield the whole lines on disk and what they say; a last one without its end was cut by a kill."""
        if not self.path.exists():
            return
        content = self.path.read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            if not line.endswith("\n"):
                continue
            try:
                record = json.loads(line)
                record["step"] + 0
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{self.path}: line {number} is no record: {line[:40]!r}; remove it") from error
            yield line[:-1], record


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"run folder {folder}: cannot be written: {error.strerror or error}") from error


def to_json(record: Record, indent: int | None = None) -> str:
    """Write a flat record as JSON, with null for numbers that are not finite."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, indent=indent, allow_nan=False)


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never half."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
