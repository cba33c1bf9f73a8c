"""``metrics.jsonl`` and ``summary.json``: the run's own record of itself."""

import json
import os
from pathlib import Path
from typing import TextIO

from distlenet.tracking import Record


class History:
    """Append each record to ``metrics.jsonl``, one JSON object a line; write ``summary.json`` at the end."""

    def __init__(self, folder: Path) -> None:
        """Write into ``folder``, which exists."""
        self.path = folder / "metrics.jsonl"
        self.summary_path = folder / "summary.json"
        self.file: TextIO | None = None
        self.complete = False

    def start(self, facts: Record) -> None:
        """Go on after step ``facts["step"]``: what an interrupted run wrote beyond it is cut off.

        Those steps are trained and recorded again, so the history has each step once.
        """
        self.complete = facts["step"] >= facts["steps"]
        kept = [line for line in self._lines() if json.loads(line)["step"] <= facts["step"]]
        replace_text(self.path, "".join(f"{line}\n" for line in kept))
        self.file = self.path.open("a", encoding="utf-8", buffering=1)

    def log(self, record: Record) -> None:
        """Append one line."""
        assert self.file is not None, "log before start"
        self.file.write(json.dumps(record) + "\n")

    def finish(self, summary: Record) -> None:
        """Write ``summary.json``; a run that was complete before keeps the one that measured its training."""
        if self.complete and self.summary_path.exists():
            return
        replace_text(self.summary_path, json.dumps(summary, indent=2) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()

    def _lines(self) -> list[str]:
        """Return the whole lines on disk; a last one without its end was cut by a kill."""
        if not self.path.exists():
            return []
        return [
            line[:-1] for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
        ]


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never half."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
