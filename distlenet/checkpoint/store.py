"""A run's ``checkpoints/``: the newest K and the best, written in the background, read with a way back."""

import contextlib
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

from distlenet.checkpoint.format import (
    TEMP_PREFIX,
    CheckpointError,
    State,
    load_checkpoint,
    to_host,
    write_atomically,
)
from distlenet.utils.errors import UserError, warn

FORMAT = re.compile(r"step-(\d+)\.pt")


class CheckpointStore:
    """Files ``step-00001234.pt`` and ``best.pt``. Rank 0 alone writes; one write at most is under way."""

    def __init__(self, directory: Path, keep_last: int) -> None:
        """Use ``directory``, which need not exist yet, and keep the ``keep_last`` newest files."""
        self.directory = directory
        self.keep_last = keep_last
        self.failure: str | None = None  # why the last write failed
        self._thread: threading.Thread | None = None
        self._unwritten_best: State | None = None  # a best that could not be written: the next write makes up for it

    def save(self, state: State, best: bool = False, before: Callable[[], None] | None = None) -> None:
        """Write ``state`` in the background, also as the best where it is, then drop those beyond the newest K.

        Returns as soon as the state is copied to host memory. ``before`` is called first, in the background.
        A write that fails leaves every older file whole; it is reported once, until one succeeds again.
        The write before it is waited for.
        """
        self.wait()
        arguments = (to_host(state), best, before)
        self._thread = threading.Thread(target=self._write_and_tell, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a write is under way."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self, timeout: float | None = None) -> str | None:
        """Wait for the write under way, ``timeout`` seconds at most; return why the last one failed, or None."""
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                return f"not done within {timeout:.3g} s, see checkpoint.preemption_grace_s"
        return self.failure

    def _write_and_tell(self, state: State, best: bool, before: Callable[[], None] | None) -> None:
        try:
            if before is not None:
                before()
            self.write(state, best)
            self.failure = None
        except Exception as error:  # a thread's exception would reach nobody
            told, self.failure = self.failure is not None, str(error)
            if not told:
                warn(f"{error}; training goes on, and saves again when the next checkpoint is due")

    def write(self, state: State, best: bool) -> Path:
        """Do what ``save`` promises, here and now. Raises UserError where the files cannot be written."""
        path = self.directory / f"step-{state['step']:08d}.pt"
        if best:
            self._unwritten_best = state
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            # The best first: a job that dies between the two evaluates again, and finds it the best again.
            if self._unwritten_best is not None:
                write_atomically(self._unwritten_best, self.directory / "best.pt")
                self._unwritten_best = None
            write_atomically(state, path)
            for old in self.by_step()[: -self.keep_last]:
                old.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"checkpoint {path}: cannot be written: {error.strerror or error}") from error
        return path

    def newest(self) -> Path | None:
        """Return the file of the highest step, whole or not; None where there is none."""
        files = self.by_step()
        return files[-1] if files else None

    def load_newest(self) -> tuple[Path, State] | None:
        """Read the newest whole checkpoint; one that is damaged is moved aside, to ``*.corrupt``, and named."""
        while (path := self.newest()) is not None:
            try:
                return path, load_checkpoint(path)
            except CheckpointError as error:
                names = (f"{path.name}.corrupt{number}" for number in ("", *range(2, 10**6)))
                aside = next(free for name in names if not os.path.lexists(free := path.with_name(name)))
                try:
                    path.replace(aside)
                except OSError as refused:
                    raise UserError(f"{error}; it cannot be moved aside: {refused.strerror or refused}") from error
                older = self.newest()
                going_on = f"going on from {older.name}" if older else "no other is left: starting anew"
                warn(f"{error.args[0]}: moved aside to {aside.name}, {going_on}")
        return None

    def remove_temporary_files(self) -> None:
        """Remove what jobs that died while writing have left. Nobody may be writing."""
        for path in self.directory.glob(f"{TEMP_PREFIX}*"):
            with contextlib.suppress(OSError):  # a folder that cannot be written will say so when it is to be
                path.unlink(missing_ok=True)

    def by_step(self) -> list[Path]:
        """Return the files, oldest step first. Raises UserError where the folder cannot be read."""
        try:
            paths = [path for path in self.directory.iterdir() if FORMAT.fullmatch(path.name)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise UserError(
                f"checkpoint {self.directory}: cannot be read: {error.strerror or error}; mend its rights"
            ) from error
        return sorted(paths, key=lambda path: int(path.stem.partition("-")[2]))


def find_checkpoint(path: Path) -> Path:
    """Return ``path`` if it is a file, else the newest checkpoint of the run folder ``path``.

    Raises UserError where there is none.
    """
    try:
        if path.is_file():
            return path
        path.stat()
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {path}: no such file or run folder; give one that is there") from error
    except OSError as error:
        raise UserError(f"checkpoint {path}: cannot be read: {error.strerror or error}") from error
    newest = CheckpointStore(path / "checkpoints", keep_last=1).newest() or CheckpointStore(path, keep_last=1).newest()
    if newest is None:
        raise UserError(f"checkpoint {path}: holds no checkpoints/step-*.pt; give a checkpoint file or a run folder")
    return newest
