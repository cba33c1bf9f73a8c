"""Build a cache file: all ranks of a node decode together, for one job of a node at a time."""

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from filelock import FileLock, Timeout

from distlenet.data.cache_file import CacheFile
from distlenet.data.chunk_decoding import ChunkDecoder, StampedImages, stamp_of_chunk
from distlenet.data.decoding_progress import DecodingProgress
from distlenet.distributed.watchdog import restart_time_limit
from distlenet.utils.errors import UserError, describe_error, warn

ROUND_S = 20.0  # seconds that a rank decodes between two exchanges
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


class CacheBuild:
    """The part of one rank in building ``file``. Chunk c belongs to rank c % ranks of the node."""

    def __init__(self, file: CacheFile, dataset: StampedImages, workers: Workers, threads: int) -> None:
        self.file, self.dataset, self.workers = file, dataset, workers
        self.lock = FileLock(file.part.with_suffix(".lock"))
        self.state: State = "waiting"
        self.announced = False
        self.progress = DecodingProgress(file.images, file.path, file.nbytes) if workers.shows_progress else None
        chunks = range(workers.rank, file.chunks, workers.ranks)
        self.decoder = ChunkDecoder(file, dataset, chunks, threads, self.progress)

    def round(self, reports: Sequence[Report]) -> Report:
        """Work for a while. ``reports`` are those of this node's ranks after the last round; none at the start."""
        state, problem, error = next((report.state for report in reports if report.is_leader), "waiting"), "", ""
        try:
            if state == "decoding" and any(report.remaining for report in reports):
                self.state = "decoding"
                self.decoder.decode(ROUND_S)
            elif self.workers.rank == 0 and state == "decoding":
                self._finish()
            elif self.workers.rank == 0 and state == "waiting":
                self._start()
        except UserError as user_error:
            error = str(user_error)
        except OSError as failure:
            self.state, problem = "failed", " ".join(str(failure.strerror or failure).split())
        except Exception as bug:  # the other ranks wait for the report
            error = f"{self.file.path}: cannot be written: {describe_error(bug)}; give data.cache=off"
        progress = self.decoder.samples_read if self.state != "waiting" else self._size_of_records()
        is_leader, remaining = self.workers.rank == 0, len(self.decoder.chunks)
        return Report(self.workers.node, is_leader, self.state, remaining, progress, problem, error)

    def _start(self) -> None:
        """Lock the file for this job and begin to decode, or wait for the lock. Raise OSError if there is no room."""
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
            self.file.reopen(stamp_of_chunk(self.file, self.dataset, chunk) for chunk in range(self.file.chunks))
        status = self.file.partial.stat() if self.file.partial.exists() else None
        needed = self.file.nbytes - (status.st_blocks * 512 if status else 0)
        free = shutil.disk_usage(self.file.path.parent).free
        if needed > free:
            raise OSError(f"the decoded images take {needed:,} bytes, and {free:,} are free")
        self.file.create()
        self.state = "decoding"

    def _finish(self) -> None:
        """Complete the file, or decode again the chunks whose records are lost. Raise OSError."""
        if missing := self.file.finish():
            self.decoder.add(missing)
        else:
            self.state = "complete"

    def _size_of_records(self) -> int:
        with contextlib.suppress(OSError):
            return os.stat(self.file.records).st_size
        return 0

    def close(self) -> None:
        """Release the lock, and end the display."""
        self.lock.release()
        if self.progress is not None:
            self.progress.close()


def is_built(file: CacheFile) -> bool:
    """Return whether a file is complete and intact. If it cannot be read, ``build_cache`` returns the reason."""
    with contextlib.suppress(OSError):
        return file.is_intact()
    return False


def threads_per_rank(workers: Workers) -> int:
    """Return the CPU cores that this rank may use, divided by the ranks that may use the same, plus 1. A collective.

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
            build.file.remove_partial()  # other files need its room
        return problem


def _has_ended(reports: Sequence[Report]) -> bool:
    """Return whether the ranks of a node, whose ``reports`` these are, have nothing more to do."""
    return any(report.state == "failed" or (report.is_leader and report.state == "complete") for report in reports)
