"""The copy of a run directory in an object store."""

import contextlib
import json
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from distlenet.storage.lease import Lease, LeaseLost
from distlenet.storage.objects import FIRST_DELAY_S, LONGEST_DELAY_S, Objects, StorageError, retry
from distlenet.storage.step_names import in_order, step_of
from distlenet.utils.errors import warn
from distlenet.utils.files import convert_io_errors, replace_text

STATE_FILE = ".mirror.json"
STALE = ".stale"
POLL_S = 1.0  # seconds between checks of the local directory

Signature = tuple[int, int]
"""Size and time of the last change of a local file, which together change with its content."""

ANNOUNCED_S = 5.0  # a longer upload at the end is announced

UNKNOWN: Signature = (-1, -1)  # of an object that is not on this disk


class RunMirror:
    """Keep a run in an object store: ``open`` downloads it to ``directory``; then a thread uploads what changes.

    Files are uploaded when there is a new checkpoint: first the others, so that no checkpoint is ahead of its history,
    then ``best.pt``, then the newest ``step-*.pt``. If that fails, training continues, and the thread tries again.
    Rank 0 only. Files whose names begin with a dot are not mirrored. Of W&B's files, only offline runs are.
    """

    def __init__(self, url: str, directory: Path, keep_last: int, is_intact: Callable[[Path], bool]) -> None:
        """Mirror ``directory``, and keep ``keep_last`` checkpoints in the store; ``is_intact`` checks one of them."""
        self.objects, self.directory, self.keep_last, self.is_intact = Objects(url), directory, keep_last, is_intact
        self.uploaded: dict[str, Signature] = {}  # by the name of the object
        self.failure: StorageError | None = None  # of the last upload
        self._complete = False  # whether the last upload has ended, with success or not
        self._closing, self._deadline = threading.Event(), math.inf
        self._thread: threading.Thread | None = None

    def open(self, patience_s: float, timeout_s: float, lost: Callable[[str], None]) -> None:
        """Lock the run for this job, and make ``directory``, which this job has locked, the newest state of the run.

        Wait up to ``patience_s`` for a run that another job is writing, and up to ``timeout_s`` for a store that does
        not answer. ``lost`` is called with the cause if another job takes over the run later. Raise StorageError, or
        UserError if the directory cannot be written.
        """
        with convert_io_errors(self.directory):
            self._open(patience_s, timeout_s, lost)
        self._thread = threading.Thread(target=self._follow, name="upload", daemon=True)
        self._thread.start()

    def _open(self, patience_s: float, timeout_s: float, lost: Callable[[str], None]) -> None:
        saved: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            saved = json.loads((self.directory / STATE_FILE).read_text())
        self.uploaded = {name: (size, changed) for name, (size, changed) in saved.get("uploaded", {}).items()}
        self.lease = Lease(self.objects, saved.get("directory") or secrets.token_hex(8))
        self._save_state()
        retry(lambda: self.lease.acquire(patience_s, lost), timeout_s)
        try:
            present = retry(self.objects.list, timeout_s)
            self.uploaded = {name: self.uploaded.get(name, UNKNOWN) for name in present}
            if not (self.lease.current and self._has_all(present)):  # otherwise only this directory has changed since
                retry(self._rename, timeout_s)
                self._set_aside(any(map(_is_downloaded, present)))
                retry(lambda: self._download(present), timeout_s)
                retry(self.lease.set_current, timeout_s)
        except BaseException:
            with contextlib.suppress(StorageError):
                self.lease.release()
            raise
        self._save_state()

    def close(self, timeout_s: float, seconds_left: Callable[[], float] = lambda: math.inf) -> StorageError | None:
        """Upload everything, and release the run.

        Return why that failed, or was not done in ``timeout_s``, or before ``seconds_left()`` was 0.
        """
        if self._thread is None:
            return None
        start = time.monotonic()
        self._deadline = start + timeout_s
        self._closing.set()
        announced = False
        while self._thread.is_alive() and (left := min(self._deadline - time.monotonic(), seconds_left())) > 0:
            self._thread.join(min(left, 1.0))
            if not announced and time.monotonic() - start > ANNOUNCED_S and self._thread.is_alive():
                announced = True
                warn(f"{self.objects.url}: uploading the rest, for up to {left:.0f} s")
        if not self._complete:
            return self.failure or StorageError(f"{self.objects.url}: not done in {time.monotonic() - start:.3g} s")
        return self.failure

    def upload(self, everything: bool = False) -> None:
        """Upload what changed. Raise StorageError; what is in the store then remains a consistent older state.

        ``everything`` includes files that change all the time.
        """
        self.lease.check()
        best, steps = self._checkpoints()
        for path in [*self._other_files(everything), best, *steps[-1:]]:
            if self._is_new(path):
                self._upload_file(path)
        if steps and self._object_name(steps[-1]) in self.uploaded:
            self._remove_old([self._object_name(path) for path in steps])
        self._save_state()

    def _checkpoints(self) -> tuple[Path, list[Path]]:
        """Return the best checkpoint, which may not exist, and all others in the order of their steps."""
        directory = self.directory / "checkpoints"
        names = os.listdir(directory) if directory.exists() else ()
        return directory / "best.pt", [directory / name for name in in_order(names)]

    def _is_new(self, path: Path) -> bool:
        """Return whether a file exists that is not uploaded."""
        return signature_of(path) not in (None, self.uploaded.get(self._object_name(path)))

    def _upload_file(self, path: Path) -> None:
        self.lease.check()  # before each file: the job may have been suspended during the one before
        signature, name = signature_of(path), self._object_name(path)
        try:
            self.objects.upload(path, name)
        except StorageError:
            if not path.exists():  # a newer one has replaced it
                return
            raise
        if signature is not None:
            self.uploaded[name] = signature

    def _remove_old(self, steps: list[str]) -> None:
        """Keep the ``keep_last`` newest checkpoints that are in the store; ``steps`` are on this disk.

        One that is not before them, and not on this disk, is damaged: remove it.
        """
        ordered = in_order({*self.uploaded, *steps})
        before = ordered[: ordered.index(steps[0])]
        stored = [name for name in ordered if name in self.uploaded]
        undamaged = [name for name in stored if name in before or name in steps]
        for name in set(stored) - set(undamaged[-self.keep_last :]):
            self.objects.remove(name)
            del self.uploaded[name]

    def _other_files(self, everything: bool) -> Iterator[Path]:
        """Yield all files but the checkpoints, in a fixed order."""
        for parent, directories, names in os.walk(self.directory):
            top = Path(parent) == self.directory
            directories[:] = sorted(
                d for d in directories if not d.startswith(".") and not (top and d == "checkpoints")
            )
            if Path(parent) == self.directory / "wandb":
                directories[:] = [d for d in directories if everything and d.startswith("offline-run-")]
                continue
            yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))

    def _object_name(self, path: Path) -> str:
        """Return the name of a file's object. Logs of another machine are not overwritten."""
        name = path.relative_to(self.directory).as_posix()
        return name.replace("logs/", f"logs/{self.lease.number:04d}/", 1) if name.startswith("logs/") else name

    def _follow(self) -> None:
        """Upload after each new checkpoint, and at the end; the body of the thread."""
        delay = POLL_S
        while not self._closing.wait(delay):
            delay = POLL_S if self._try_upload() else min(2 * delay, LONGEST_DELAY_S)
        delay = FIRST_DELAY_S
        while not self._try_upload(everything=True):
            if (self.failure and self.failure.permanent) or time.monotonic() + delay > self._deadline:
                break
            time.sleep(delay)
            delay = min(2 * delay, LONGEST_DELAY_S)
        self._complete = True
        with contextlib.suppress(StorageError):
            self.lease.release()

    def _try_upload(self, everything: bool = False) -> bool:
        """Upload ``everything``, or what changed if there is a new checkpoint or start; return whether it succeeded."""
        try:
            best, steps = self._checkpoints()
            if everything or any(map(self._is_new, [self.directory / "starts.jsonl", best, *steps[-1:]])):
                self.upload(everything)
        except StorageError as error:
            if self.failure is None and not self._closing.is_set() and not isinstance(error, LeaseLost):
                warn(f"{error}; training continues, checkpoints stay in {self.directory} until the store accepts them")
            self.failure = error
        except OSError as error:  # of the local disk
            self.failure = StorageError(f"{self.directory}: {error.strerror or error}")
        else:
            self.failure = None
        return self.failure is None

    def _has_all(self, present: Mapping[str, str]) -> bool:
        """Return whether nothing that is in the store has been removed from this disk, as old temporary files are."""
        local = {self._object_name(path) for path in self._checkpoints()[1]}
        newest = in_order(local.union(present))[-1:]
        needed = filter(_is_downloaded, present)
        return local.issuperset(newest) and all((self.directory / name).exists() for name in needed)

    def _rename(self) -> None:
        """Change the identity of the directory, so that no run of another store takes its files for its own."""
        self.lease.directory = secrets.token_hex(8)
        self._save_state()
        self.lease.renew()

    def _set_aside(self, stored: bool) -> None:
        """Move files of another state of the run out of the way; ``stored``: whether the store has any."""
        kept = (".lock", STATE_FILE, STALE)
        files = [path for path in self.directory.iterdir() if path.name not in kept]
        if any(path.is_file() or any(path.iterdir()) for path in files):
            aside = self.directory / STALE / f"before-{self.lease.number:08d}"
            aside.mkdir(parents=True)
            for path in files:
                path.replace(aside / path.name)
            here, url = self.directory, self.objects.url
            if stored:
                warn(f"{here}: is older than {url}; the local files are moved to {aside}")
            else:
                warn(f"{here}: {url} has no files of this run; the local files are moved to {aside}")

    def _download(self, present: Mapping[str, str]) -> None:
        """Download the run, of the checkpoints the best and the newest undamaged one."""
        for name in filter(_is_downloaded, present):
            self._download_file(name)
        for name in reversed(in_order(present)):
            self._download_file(name)
            if self.is_intact(self.directory / name):
                break

    def _download_file(self, name: str) -> None:
        path = self.directory / name
        self.objects.download(name, path)
        if (signature := signature_of(path)) is not None:
            self.uploaded[name] = signature

    def _save_state(self) -> None:
        state = {"directory": self.lease.directory, "uploaded": self.uploaded}
        replace_text(self.directory / STATE_FILE, json.dumps(state))


def _is_downloaded(name: str) -> bool:
    """Return whether each download includes an object."""
    return not name.startswith((".", "logs/")) and step_of(name) is None


def signature_of(path: Path) -> Signature | None:
    """Return the signature of a file, or None if there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns
