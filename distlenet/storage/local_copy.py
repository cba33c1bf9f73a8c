"""The local copy of a run in an object store: a directory, which training reads and writes."""

import contextlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from distlenet.utils.files import replace_text
from distlenet.utils.step_names import in_order, step_of

STATE_FILE = ".local_copy.json"
STALE = ".stale"


class LocalCopy:
    """The files in ``directory``, and which of them are in the store.

    ``id`` identifies this state of the directory to other jobs. ``uploaded`` holds, by the names of the objects in the
    store, the signatures of the same files; None if the object is of another disk. Files whose names begin with a dot
    are not uploaded. Of W&B's files, only offline runs are.
    """

    def __init__(self, directory: Path) -> None:
        """Read what an earlier job saved. Raise OSError if the directory cannot be written."""
        self.directory = directory
        saved: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            saved = json.loads((directory / STATE_FILE).read_text())
        self.id: str = saved.get("id") or secrets.token_hex(8)
        self.uploaded: dict[str, str | None] = saved.get("uploaded", {})
        self.save()

    def save(self) -> None:
        """Save ``id`` and ``uploaded``. Raise OSError."""
        replace_text(self.directory / STATE_FILE, json.dumps({"id": self.id, "uploaded": self.uploaded}))

    def change_id(self) -> None:
        """Give the directory another identity, so that no run of another store takes its files for its own."""
        self.id = secrets.token_hex(8)
        self.save()

    def checkpoints(self) -> tuple[Path, list[Path]]:
        """Return the best checkpoint, which may not exist, and all others in the order of their steps."""
        directory = self.directory / "checkpoints"
        names = os.listdir(directory) if directory.exists() else ()
        return directory / "best.pt", [directory / name for name in in_order(names)]

    def other_files(self, everything: bool) -> Iterator[Path]:
        """Yield all files but the checkpoints, in a fixed order; ``everything`` includes those of W&B."""
        for parent, directories, names in os.walk(self.directory):
            top = Path(parent) == self.directory
            directories[:] = sorted(
                d for d in directories if not d.startswith(".") and not (top and d == "checkpoints")
            )
            if Path(parent) == self.directory / "wandb":
                directories[:] = [d for d in directories if everything and d.startswith("offline-run-")]
                continue
            yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))

    def object_name(self, path: Path) -> str:
        """Return the name of the object of a file."""
        return path.relative_to(self.directory).as_posix()

    def has_all(self, present: Iterable[str]) -> bool:
        """Return whether no file of the objects ``present`` has been removed, as old temporary files are."""
        local = set(map(self.object_name, self.checkpoints()[1]))
        newest = in_order(local.union(present))[-1:]
        return local.issuperset(newest) and all((self.directory / name).exists() for name in filter(is_needed, present))

    def has_shrunk(self, name: str) -> bool:
        """Return whether a history, to which training only appends, is shorter than what was uploaded."""
        uploaded = self.uploaded.get(name)
        if uploaded is None or not name.endswith(".jsonl"):
            return False
        return (self.directory / name).stat().st_size < int(uploaded.split()[0])

    def set_aside(self, name: str) -> Path | None:
        """Move all files to ``name`` in ``.stale``, and return that directory; None if there are no files."""
        files = [path for path in self.directory.iterdir() if path.name not in (".lock", STATE_FILE, STALE)]
        if not any(path.is_file() or any(path.iterdir()) for path in files):
            return None
        aside = self.directory / STALE / name
        aside.mkdir(parents=True)
        for path in files:
            path.replace(aside / path.name)
        return aside


def is_needed(name: str) -> bool:
    """Return whether a complete local copy must have this object."""
    return not name.startswith((".", "logs/")) and step_of(name) is None


def signature(path: Path) -> str | None:
    """Return size and time of the last change of a file, which change with its content; None if there is no file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return f"{status.st_size} {status.st_mtime_ns}"
