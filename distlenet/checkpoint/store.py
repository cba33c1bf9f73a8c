"""The checkpoint directory of a run: the newest files, the last and the best, written in the background."""

import contextlib
import filecmp
import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path

from distlenet.checkpoint.format import (
    CheckpointError,
    State,
    link_atomically,
    load_checkpoint,
    write_atomically,
)
from distlenet.checkpoint.host_copy import copy_to_host, memory_for
from distlenet.storage.fetch import fetch_checkpoint
from distlenet.utils.errors import UserError, warn
from distlenet.utils.files import TEMP_PREFIX
from distlenet.utils.step_names import in_order, step_name
from distlenet.utils.urls import is_url


class CheckpointStore:
    """The files ``step-00001234.pt``, the ``keep_last`` newest; ``last.pt``, which is the newest; and ``best.pt``.

    Only rank 0 writes, one at a time.
    """

    def __init__(self, directory: Path, keep_last: int) -> None:
        self.directory, self.keep_last = directory, keep_last
        self.failure: str | None = None  # the error of the last write
        self._allocation: threading.Thread | None = None
        self._write: threading.Thread | None = None
        self._copy: State | None = None  # the last one in host memory, which the next one overwrites
        self._unwritten_best: State | None = None  # a best checkpoint that the next write must include

    def reserve(self, state: State) -> None:
        """Allocate memory for the copies of ``state`` in the background. The first save waits until this is done."""

        def allocate() -> None:
            self._copy = memory_for(state)

        self._allocation = threading.Thread(target=allocate, name="checkpoint memory", daemon=True)
        self._allocation.start()

    def save(self, state: State, best: bool = False, before: Callable[[], None] = lambda: None) -> None:
        """Copy ``state`` to host memory, call ``before`` and write it in the background, after the previous write.

        If that fails, all older files stay as they are, and a warning is logged once until a write succeeds.
        """

        def write_or_warn() -> None:
            try:
                before()
                self.write(copy)
                self.failure = None
            except Exception as error:  # an exception of a thread would be lost
                if self.failure is None:
                    warn(f"{error}; training continues, and saves again when the next checkpoint is due")
                self.failure = str(error)

        self.wait()
        previous = None if self._copy is self._unwritten_best else self._copy
        copy = self._copy = copy_to_host(state, previous)
        if best:  # also if ``before`` fails
            self._unwritten_best = copy
        self._write = threading.Thread(target=write_or_warn, name="checkpoint", daemon=True)
        self._write.start()

    @property
    def busy(self) -> bool:
        """Whether a write is in progress."""
        return self._write is not None and self._write.is_alive()

    def wait(self, timeout: float | None = None) -> str | None:
        """Wait up to ``timeout`` seconds for an allocation or a write; return the error of the last write, or None."""
        for thread in (self._allocation, self._write):  # never both: a write begins after the allocation
            if thread is not None:
                thread.join(timeout)
                if thread.is_alive():
                    return f"not done within {timeout:.3g} s, see checkpoint.preemption_grace_s"
        return self.failure

    def write(self, state: State) -> Path:
        """Write a checkpoint, also as ``last.pt``, and a best one that ``save`` received; remove old ones.

        Raise UserError if a file cannot be written.
        """
        path = self.directory / step_name(state["step"])
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            # The best first: a job killed between the two writes evaluates again and finds it the best again.
            if self._unwritten_best is not None:
                write_atomically(self._unwritten_best, self.directory / "best.pt")
                self._unwritten_best = None
            write_atomically(state, path)
            link_atomically(path, self.directory / "last.pt")
            for old in self.by_step()[: -self.keep_last]:
                old.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"checkpoint {path}: cannot be written: {error.strerror or error}") from error
        return path

    def newest(self) -> Path | None:
        """Return the file of the highest step, damaged or not; None if there is none."""
        return next(reversed(self.by_step()), None)

    def load_newest(self) -> tuple[Path, State] | None:
        """Load the newest undamaged checkpoint; rename damaged ones to ``*.corrupt`` and log a warning."""
        while (path := self.newest()) is not None:
            try:
                return path, load_checkpoint(path)
            except CheckpointError as error:
                names = (f"{path.name}.corrupt{number}" for number in itertools.chain([""], itertools.count(2)))
                aside = next(free for name in names if not os.path.lexists(free := path.with_name(name)))
                try:
                    path.replace(aside)
                except OSError as refused:
                    raise UserError(f"{error}; it cannot be moved aside: {refused.strerror or refused}") from error
                older = self.newest()
                action = f"resuming from {older.name}" if older else "no other exists, starting from scratch"
                warn(f"{error}: moved aside to {aside.name}, {action}")
        return None

    def remove_temporary_files(self) -> None:
        """Remove the files of writes that were killed. No process may be writing."""
        with contextlib.suppress(OSError):  # if the directory is not writable, the next write reports it
            for path in self.directory.glob(f"{TEMP_PREFIX}*"):
                path.unlink()

    def repair_last(self) -> None:
        """Make ``last.pt`` the newest checkpoint again, after a kill between two writes or a damaged file."""
        newest, last = self.newest(), self.directory / "last.pt"
        if newest is not None:
            with contextlib.suppress(OSError):  # if the directory is not writable, the next write reports it
                if not (last.exists() and (last.samefile(newest) or filecmp.cmp(last, newest, shallow=False))):
                    link_atomically(newest, last)

    def by_step(self) -> list[Path]:
        """Return the files ordered by step. Raise UserError if the directory cannot be read."""
        try:
            return [self.directory / name for name in in_order(os.listdir(self.directory))]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            failure = f"cannot be read: {error.strerror or error}"
            raise UserError(f"checkpoint {self.directory}: {failure}; fix its permissions") from error


def find_checkpoint(path: str | Path) -> Path:
    """Return ``path`` if it is a file, else the newest checkpoint of the run directory ``path``. Raise UserError.

    ``path`` may be a URL of an object store: then it is downloaded.
    """
    if is_url(path):
        return fetch_checkpoint(str(path))
    path = Path(path)
    if os.path.isfile(path):
        return path
    directories = (path / "checkpoints", path)
    newest = next((found for each in directories if (found := CheckpointStore(each, keep_last=1).newest())), None)
    if newest is None:
        reason = "has no checkpoints/step-*.pt" if os.path.exists(path) else "no such file or directory"
        advice = "give a checkpoint file or a run directory"
        if path.name == "best.pt":
            advice += "; best.pt needs a validation set, see data.validation"
        raise UserError(f"checkpoint {path}: {reason}; {advice}")
    return newest
