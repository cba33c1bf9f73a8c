"""What a question finds: Markdown and promises, saved after each addition, so that nothing is lost at a crash."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Promise:
    """A statement that the project makes, whether it holds, and the figures."""

    text: str
    ok: bool
    detail: str = ""


@dataclass
class Result:
    """The findings of one question: paragraphs and tables by name, and promises."""

    path: Path
    parts: dict[str, str] = field(default_factory=dict)
    promises: list[Promise] = field(default_factory=list)

    def show(self, name: str, text: str) -> None:
        """Add a paragraph or table, or replace the one of this name."""
        self.parts[name] = text
        self._save()

    def promise(self, text: str, ok: bool, detail: str = "") -> None:
        """Add a promise."""
        self.promises.append(Promise(text, bool(ok), detail))
        self._save()

    def _save(self) -> None:
        content = {"parts": self.parts, "promises": [asdict(promise) for promise in self.promises]}
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(content))
        new.rename(self.path)


def load(path: Path) -> Result:
    """Return a saved result; without a file, an empty one."""
    content = json.loads(path.read_text()) if path.exists() else {"parts": {}, "promises": []}
    return Result(path, content["parts"], [Promise(**promise) for promise in content["promises"]])


def listing(text: str) -> str:
    """Return output of a program as an indented block of Markdown."""
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def table(header: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """Return a Markdown table; the first ``left`` columns are aligned left, the others right."""
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" * left + " ---: |" * (len(header) - left)]
    return "\n".join([*lines, *(f"| {' | '.join(cell(value) for value in row)} |" for row in rows)])


def cell(value: object) -> str:
    """Return the text of a table cell: one line, without the character that separates cells."""
    return " ".join(str(value).replace("|", "\\|").split())
