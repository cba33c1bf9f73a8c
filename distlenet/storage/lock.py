"""A lock on a run in an object store, which a job that died does not hold forever.

Each job creates the next of the objects ``.locks/00000001``, ``.locks/00000002`` and so on, which only one job can.
It renews the object every ``RENEW_S`` seconds. Another job takes over only if the newest object is released, or does
not change for ``EXPIRES_S`` seconds by its own clock, so that clocks of machines are never compared. A job that finds a
newer object than its own has lost the run, and must not write any more.
"""

import contextlib
import json
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from distlenet.storage.objects import LOCKS, Objects, StorageError
from distlenet.utils.errors import warn

RENEW_S, EXPIRES_S, POLL_S = 10.0, 45.0, 3.0
# Seconds that a check is valid: a request costs CPU time, and another job needs EXPIRES_S to take over.
CHECKED_S = 2.0


class LockLost(StorageError):
    """Another job writes to the run now."""


class RunLock:
    """The lock of one job on the run ``objects``.

    ``copy`` identifies the local copy that the job writes. A job with the same one does not wait: the lock on its
    directory shows that the earlier job has ended. ``complete``, in the lock object, is whether the local copy has
    everything that is in the store. From ``acquire`` on, a thread renews the lock; it calls ``lost`` with the cause if
    another job takes it.
    """

    def __init__(
        self,
        objects: Objects,
        copy: str,
        lost: Callable[[str], None],
        renew_s: float = RENEW_S,
        expires_s: float = EXPIRES_S,
        poll_s: float = POLL_S,
    ) -> None:
        self.objects, self.copy, self.complete = objects, copy, False
        self.lost, self.renew_s, self.expires_s, self.poll_s = lost, renew_s, expires_s, poll_s
        self.number, self.nonce, self.renewals = 0, "", 0
        self._checked = -math.inf  # the time of the last check's request
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)

    def acquire(self, patience_s: float) -> bool:
        """Take the lock, and return whether the local copy has everything that is in the store.

        Wait up to ``patience_s`` for a lock that another job renews. Raise StorageError if another job is writing.
        """
        deadline = time.monotonic() + patience_s
        while True:
            previous, content = self._newest()
            own = content.get("copy") == self.copy
            if previous and not own and not content.get("released") and not self._expires(previous, content, deadline):
                continue
            self.complete = own and bool(content.get("complete"))
            self.number, self.nonce = previous + 1, secrets.token_hex(8)
            self.objects.create(self._name(), self._content())
            _, content = self._newest()
            if content.get("nonce") == self.nonce:
                break
            if time.monotonic() >= deadline:
                raise self._in_use(content)
        for name in self.objects.list(LOCKS):
            if name < self._name():
                self.objects.remove(name)
        self._thread.start()
        return self.complete

    def describe(self, copy: str, complete: bool) -> None:
        """Write to the lock object which local copy this job writes. Raise StorageError."""
        self.copy, self.complete = copy, complete
        self._write()

    def check(self) -> None:
        """Raise LockLost if another job has taken the run, StorageError if the store cannot be read.

        Ask the store only if the last answer is older than ``CHECKED_S``.
        """
        request_time = time.monotonic()  # the process may be suspended before it reads the answer
        if request_time - self._checked < CHECKED_S:
            return
        number, content = self._newest()
        if number and content.get("nonce") != self.nonce:  # 0: somebody removed the lock, the next renewal restores it
            raise LockLost(
                f"{self.objects.url}: the job on {content.get('host')} has taken over this run, since this job could "
                "not reach the store",
                permanent=True,
            )
        self._checked = request_time

    def check_age(self) -> None:
        """Raise StorageError if the last check, which the thread repeats, is so old that another job may have the run.

        This asks the store nothing. The process may have been suspended since; the caller must check and start anew.
        """
        if time.monotonic() - self._checked > self.expires_s / 2:
            raise StorageError(f"{self.objects.url}: the upload was interrupted for too long")

    def release(self) -> None:
        """Let other jobs take the lock at once, if this job still holds it. Raise StorageError."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(LockLost):
            self.check()
            self._write(released=True)

    def _newest(self) -> tuple[int, dict[str, Any]]:
        """Return the number and the content of the newest lock object; 0 and nothing if there is none."""
        numbers = [int(name) for path in self.objects.list(LOCKS) if (name := path.rpartition("/")[2]).isdecimal()]
        if not numbers:
            return 0, {}
        try:
            content = json.loads(self.objects.read(f"{LOCKS}/{max(numbers):08d}"))
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):  # another job has just replaced it
                return self._newest()
            raise
        except ValueError:  # damaged: it expires
            content = {}
        return max(numbers), content if isinstance(content, dict) else {}

    def _expires(self, number: int, content: dict[str, Any], deadline: float) -> bool:
        """Wait until the lock has not changed for ``expires_s``; return False if it is released or replaced."""
        warn(
            f"{self.objects.url}: the job on {content.get('host')} holds this run; waiting up to "
            f"{self.expires_s:.0f} s to see whether it is alive"
        )
        unchanged_since = time.monotonic()
        while time.monotonic() < unchanged_since + self.expires_s:
            time.sleep(self.poll_s)
            newest, now = self._newest()
            if newest != number or now.get("released"):
                return False
            if now != content:
                if time.monotonic() >= deadline:
                    raise self._in_use(now)
                content, unchanged_since = now, time.monotonic()
        return True

    def _in_use(self, content: dict[str, Any]) -> StorageError:
        writer = f"process {content.get('pid')} on {content.get('host')}"
        fix = "give another run.name, or wait"
        return StorageError(f"run {self.objects.url}: another job is writing there, {writer}; {fix}", permanent=True)

    def _name(self) -> str:
        return f"{LOCKS}/{self.number:08d}"

    def _write(self, released: bool = False) -> None:
        self.objects.write(self._name(), self._content(released))

    def _content(self, released: bool = False) -> bytes:
        self.renewals += 1
        content = {"host": socket.gethostname(), "pid": os.getpid(), "nonce": self.nonce, "renewals": self.renewals}
        content |= {"copy": self.copy, "complete": self.complete, "released": released}
        return json.dumps(content).encode()

    def _renew(self) -> None:
        while not self._stop.wait(self.renew_s):
            try:
                self.check()
                self._write()
            except LockLost:
                self.lost("another job, which has taken over the run,")
                return
            except StorageError:
                continue  # the upload of a checkpoint reports it
