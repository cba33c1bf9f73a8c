"""Decode the images of a data set into a cache file: all ranks of a node together, and one job of a node at a time."""

import contextlib
import hashlib
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from distlenet.data.cache_file import CacheFile
from distlenet.data.decoding_progress import DecodingProgress
from distlenet.distributed.watchdog import restart_time_limit
from distlenet.task import MapDataset
from distlenet.utils.errors import UserError, warn

ROUND_S = 20.0  # a rank decodes for so long before the ranks exchange their states
WAIT_S = 2.0  # the same while another process decodes the images

State = Literal["waiting", "decoding", "complete", "failed"]


@dataclass(frozen=True)
class Report:
    """The state of a rank after a round."""

    node: int
    is_leader: bool  # the rank that holds the lock
    state: State
    remaining: int  # chunks
    progress: int  # changes if the images are being decoded, here or in another process
    problem: str = ""  # why the images cannot be stored
    error: str = ""  # what ends the job: an image that cannot be read, or a bug


@dataclass(frozen=True)
class Workers:
    """The ranks of a node, and how they exchange reports."""

    rank: int = 0  # of this process, on its node
    ranks: int = 1
    node: int = 0
    shows_progress: bool = True
    exchange: Callable[[Any], list[Any]] = lambda value: [value]  # the values of all ranks of all nodes: a collective


class StampedImages(MapDataset, Protocol):
    """Images of one shape, as (image, label), and what identifies the file of each."""

    @property
    def thread_safe(self) -> bool:
        """Whether several threads may read it at once."""

    def name(self, index: int) -> str:
        """Return how messages call an image."""

    def stamps(self, start: int, stop: int) -> list[str]:
        """Return a text for each of the images; another one if its file may have changed."""


class CacheBuild:
    """The part of one rank in decoding ``dataset`` into ``file``. Chunk c belongs to rank c % ranks of the node."""

    def __init__(self, file: CacheFile, dataset: StampedImages, workers: Workers, threads: int) -> None:
        self.file, self.dataset, self.workers = file, dataset, workers
        self.threads = threads if dataset.thread_safe else 1
        self.lock = FileLock(file.part.with_suffix(".lock"))
        self.state: State = "waiting"
        self.chunks = deque(range(workers.rank, file.chunks, workers.ranks))
        self.share = len(self.chunks)
        self.begun: dict[int, list[tuple[Tensor, int]]] = {}  # the first samples of chunks
        self.samples_read = 0
        self.records: dict[int, tuple[int, str]] | None = None
        self.stopped = False
        self.announced = False
        self.progress = DecodingProgress(file.images, file.path, file.nbytes) if workers.shows_progress else None

    def round(self, reports: Sequence[Report]) -> Report:
        """Work for a while. ``reports`` are those of this node's ranks after the last round; none at the start."""
        state, problem, error = next((report.state for report in reports if report.is_leader), "waiting"), "", ""
        try:
            if state == "decoding" and any(report.remaining for report in reports):
                self._decode()
            elif self.workers.rank == 0 and state == "decoding":
                self._finish()
            elif self.workers.rank == 0 and state == "waiting":
                self._start()
        except UserError as user_error:
            error = str(user_error)
        except OSError as failure:
            self.state, problem = "failed", " ".join(str(failure.strerror or failure).split())
        except Exception as bug:  # the other ranks wait for the report
            error = f"{self.file.path}: cannot be written: {_text_of(bug)}; give data.cache=off"
        progress = self.samples_read if self.state != "waiting" else self._size_of_records()
        is_leader = self.workers.rank == 0
        return Report(self.workers.node, is_leader, self.state, len(self.chunks), progress, problem, error)

    def _start(self) -> None:
        """Become the job of this node that decodes, or wait for it. Raise OSError if there is no room."""
        try:
            self.file.path.parent.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=WAIT_S if self.announced else 0)
        except Timeout:
            if not self.announced:
                self.announced = True
                warn(f"another process decodes the images into {self.file.path}; this one waits for it")
            return
        if self.file.is_intact():
            self.state = "complete"
            return
        if self.file.path.exists():
            warn(f"{self.file.path}: is damaged; its damaged images are decoded again")
            self.file.reopen(map(self._stamp, range(self.file.chunks)))
        status = self.file.partial.stat() if self.file.partial.exists() else None
        needed = self.file.nbytes - (status.st_blocks * 512 if status else 0)
        free = shutil.disk_usage(self.file.path.parent).free
        if needed > free:
            raise OSError(f"the decoded images take {needed:,} bytes, and {free:,} are free")
        self.file.create()
        self.state = "decoding"

    def _decode(self) -> None:
        """Decode chunks of this rank. Raise UserError if an image cannot be read, OSError if one cannot be stored."""
        self.state = "decoding"
        if self.records is None:
            self.records = self.file.read_records()
        deadline = time.monotonic() + ROUND_S
        if self.threads == 1:  # a user's dataset may hold what belongs to this thread
            self._decode_until(deadline)
            return
        before = torch.get_num_threads()
        try:  # torch's number of threads is that of each thread of Python
            with ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                for future in [pool.submit(self._decode_until, deadline) for _ in range(self.threads)]:
                    future.result()
        finally:
            torch.set_num_threads(before)

    def _decode_until(self, deadline: float) -> None:
        assert self.records is not None
        while time.monotonic() < deadline and not self.stopped:
            try:
                chunk = self.chunks.popleft()
            except IndexError:
                return
            try:
                stamp = self._stamp(chunk)
                checksum, written = self.records.get(chunk, (0, ""))
                if written != stamp or not self.file.has_chunk(self.file.partial, chunk, checksum):
                    samples = self._read(chunk, deadline)
                    if samples is None:
                        self.chunks.appendleft(chunk)
                        return
                    self.file.write_chunk(chunk, stamp, samples)
            except BaseException:
                self.stopped = True
                raise
            if self.progress is not None:
                self.progress.update(1 - len(self.chunks) / self.share)

    def _read(self, chunk: int, deadline: float) -> list[tuple[Tensor, int]] | None:
        """Return the samples of a chunk, or None if they are not complete in time; the next round continues."""
        samples = self.begun.pop(chunk, [])
        for row in self.file.rows(chunk)[len(samples) :]:
            if time.monotonic() >= deadline:
                self.begun[chunk] = samples
                return None
            try:
                samples.append(self.dataset[row])
            except UserError:
                raise
            except Exception as error:  # not one of the cache's files
                raise UserError(f"{self.dataset.name(row)}: {_text_of(error)}; fix the dataset") from error
            self.samples_read += 1
        return samples

    def _finish(self) -> None:
        """Complete the file, or decode again the chunks whose records are lost. Raise OSError."""
        missing = self.file.finish()
        if not missing:
            self.state = "complete"
            return
        self.chunks.extend(missing)
        self.share, self.records = len(missing), None

    def _stamp(self, chunk: int) -> str:
        """Return a digest of the stamps of the chunk's image files."""
        rows = self.file.rows(chunk)
        stamps = "\n".join(self.dataset.stamps(rows.start, rows.stop))
        return hashlib.sha256(stamps.encode(errors="surrogateescape")).hexdigest()[:32]

    def _size_of_records(self) -> int:
        with contextlib.suppress(OSError):
            return os.stat(self.file.records).st_size
        return 0

    def close(self) -> None:
        """Release the lock, and end the display."""
        self.lock.release()
        if self.progress is not None:
            self.progress.close()


def _text_of(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def is_built(file: CacheFile) -> bool:
    """Return whether a file is complete and intact. If it cannot be read, ``build_cache`` returns the reason."""
    with contextlib.suppress(OSError):
        return file.is_intact()
    return False


def threads_per_rank(workers: Workers) -> int:
    """Return the CPU cores that this rank may use, divided by the ranks that may use the same, and 1. A collective.

    With one thread more than cores, a file is read while others are decoded.
    """
    own = workers.node, frozenset(os.sched_getaffinity(0))
    return len(own[1]) // workers.exchange(own).count(own) + 1


def build_cache(file: CacheFile | None, dataset: StampedImages | None, workers: Workers, keep: bool) -> str:
    """Decode ``dataset`` into ``file``; both are None if there is nothing to do on this node. A collective.

    Return why the images of this node could not be stored, or "". What was stored then stays if ``keep``. Raise
    UserError on all ranks if an image cannot be read; the finished chunks stay.
    """
    threads = threads_per_rank(workers)
    report, own = Report(workers.node, workers.rank == 0, "complete", 0, 0), list[Report]()
    last: list[Report] = []
    with contextlib.ExitStack() as stack:
        build = None
        if file is not None and dataset is not None:
            build = stack.enter_context(contextlib.closing(CacheBuild(file, dataset, workers, threads)))
        while True:
            if build is not None and not _has_ended(own):
                report = build.round(own)
            reports: list[Report] = workers.exchange(report)
            if error := next((each.error for each in reports if each.error), ""):
                raise UserError(error)
            if reports != last:
                restart_time_limit()
            last, own = reports, [each for each in reports if each.node == workers.node]
            if all(_has_ended([each for each in reports if each.node == node]) for node in {r.node for r in reports}):
                break
        problem = next((each.problem for each in own if each.problem), "")
        if build is not None and problem and not keep and build.lock.is_locked:
            build.file.remove_partial()  # it takes the room of other files
        return problem


def _has_ended(reports: Sequence[Report]) -> bool:
    """Return whether the ranks of a node, whose ``reports`` these are, have nothing more to do."""
    return any(report.state == "failed" or (report.is_leader and report.state == "complete") for report in reports)
