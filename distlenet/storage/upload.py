"""The thread that uploads what changes in a local copy."""

import contextlib
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

from distlenet.storage.local_copy import LocalCopy, signature
from distlenet.storage.lock import LockLost, RunLock
from distlenet.storage.objects import FIRST_DELAY_S, LONGEST_DELAY_S, Objects, StorageError
from distlenet.utils.errors import warn
from distlenet.utils.step_names import in_order

POLL_S = 1.0  # seconds between checks of the local copy
ATTEMPTS, ATTEMPT_DELAY_S = 4, 0.05  # of one file, about as often as fsspec's package repeats other requests
ANNOUNCED_S = 5.0  # a longer upload at the end is announced


class Upload:
    """Upload a local copy to ``objects`` until ``close``, while this job has the lock.

    Files are uploaded when there is a new checkpoint: first the others, so that no checkpoint is ahead of its history,
    then ``best.pt``, then the newest ``step-*.pt``, of which the store keeps ``keep_last``. If that fails, training
    continues, and the thread tries again.
    """

    def __init__(self, objects: Objects, copy: LocalCopy, lock: RunLock, keep_last: int) -> None:
        self.objects, self.copy, self.lock, self.keep_last = objects, copy, lock, keep_last
        self.failure: StorageError | None = None  # of the last upload
        self._cause: StorageError | None = None  # of the last attempt, which is being repeated
        self._complete = False  # whether the last upload has ended, with success or not
        self._closing, self._deadline = threading.Event(), math.inf
        self._thread = threading.Thread(target=self._follow, name="upload", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float, seconds_left: Callable[[], float] = lambda: math.inf) -> StorageError | None:
        """Upload everything, and release the run.

        Return why that failed, or was not done in ``timeout_s``, or before ``seconds_left()`` was 0.
        """
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
            return (
                self.failure
                or self._cause
                or StorageError(f"{self.objects.url}: not done in {time.monotonic() - start:.3g} s")
            )
        return self.failure

    def upload(self, everything: bool = False) -> None:
        """Upload what changed. Raise StorageError; what is in the store then remains a consistent older state.

        ``everything`` includes files that change all the time.
        """
        self.lock.check()
        best, steps = self.copy.checkpoints()
        for path in [*self.copy.other_files(everything), best, *steps[-1:]]:
            if self._is_new(path):
                self._upload_file(path)
        names = [self._object_name(path) for path in steps]
        if names and names[-1] in self.copy.uploaded:
            self._remove_old(names)
        self.copy.save()

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
            self.lock.release()

    def _try_upload(self, everything: bool = False) -> bool:
        """Upload ``everything``, or what changed if there is a new checkpoint or start; return whether it succeeded."""
        directory = self.copy.directory
        try:
            best, steps = self.copy.checkpoints()
            if everything or any(map(self._is_new, [directory / "starts.jsonl", best, *steps[-1:]])):
                self.upload(everything)
        except StorageError as error:
            if self.failure is None and not self._closing.is_set() and not isinstance(error, LockLost):
                warn(f"{error}; training continues, checkpoints stay in {directory} until the store accepts them")
            self.failure = error
        except OSError as error:  # of the local disk
            self.failure = StorageError(f"{directory}: {error.strerror or error}")
        else:
            self.failure = None
        return self.failure is None

    def _is_new(self, path: Path) -> bool:
        """Return whether a file exists that is not uploaded."""
        return signature(path) not in (None, self.copy.uploaded.get(self._object_name(path)))

    def _upload_file(self, path: Path) -> None:
        """Upload a file in up to ``ATTEMPTS`` attempts, each after a check of the lock.

        A repeated request without a check may overwrite what another job wrote while this one was suspended.
        """
        name = self._object_name(path)
        for attempt in range(1, ATTEMPTS + 1):
            self.lock.check()
            before = signature(path)
            try:
                self.objects.upload(path, name, self.lock.check_age)
            except StorageError as error:
                if not path.exists():  # a newer one has replaced it
                    return
                self._cause, delay = error, 2**attempt * ATTEMPT_DELAY_S
                if error.permanent or attempt == ATTEMPTS or time.monotonic() + delay > self._deadline:
                    raise
                time.sleep(delay)
            else:
                self.copy.uploaded[name], self._cause = before, None
                return

    def _remove_old(self, steps: list[str]) -> None:
        """Keep the ``keep_last`` newest checkpoints that are in the store; ``steps`` are on this disk.

        One that is not before them, and not on this disk, is damaged: remove it.
        """
        ordered = in_order({*self.copy.uploaded, *steps})
        before = ordered[: ordered.index(steps[0])]
        stored = [name for name in ordered if name in self.copy.uploaded]
        undamaged = [name for name in stored if name in before or name in steps]
        for name in set(stored) - set(undamaged[-self.keep_last :]):
            self.lock.check()
            self.objects.remove(name)
            del self.copy.uploaded[name]

    def _object_name(self, path: Path) -> str:
        """Return the name of a file's object. Logs of another machine are not overwritten."""
        name = self.copy.object_name(path)
        return name.replace("logs/", f"logs/{self.lock.number:04d}/", 1) if name.startswith("logs/") else name
