"""Decode images into the chunks of a cache file: what one rank does between two exchanges with the others."""

import hashlib
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from distlenet.data.cache_file import CacheFile
from distlenet.data.decoding_progress import DecodingProgress
from distlenet.task import MapDataset
from distlenet.utils.errors import UserError, describe_error, log_traceback


class StampedImages(MapDataset, Protocol):
    """Images of one shape, as (image, label), and what identifies the file of each."""

    @property
    def thread_safe(self) -> bool:
        """Whether several threads may read it at once."""

    def name(self, index: int) -> str:
        """Return how messages call an image."""

    def stamps(self, start: int, stop: int) -> list[str]:
        """Return a text for each of the images; another one if its file may have changed."""


def stamp_of_chunk(file: CacheFile, dataset: StampedImages, chunk: int) -> str:
    """Return a digest of the stamps of a chunk's images."""
    rows = file.rows(chunk)
    stamps = "\n".join(dataset.stamps(rows.start, rows.stop))
    return hashlib.sha256(stamps.encode(errors="surrogateescape")).hexdigest()[:32]


class ChunkDecoder:
    """Decodes the images of ``dataset`` into some ``chunks`` of ``file``."""

    def __init__(
        self,
        file: CacheFile,
        dataset: StampedImages,
        chunks: Iterable[int],
        threads: int,
        progress: DecodingProgress | None,
    ) -> None:
        self.file, self.dataset, self.progress = file, dataset, progress
        self.threads = threads if dataset.thread_safe else 1
        self.chunks = deque(chunks)  # not finished
        self.total = len(self.chunks)
        self.unfinished: dict[int, list[tuple[Tensor, int]]] = {}  # the first samples of chunks
        self.samples_read = 0
        self.records: dict[int, tuple[int, str]] | None = None
        self.failed = False

    def add(self, chunks: list[int]) -> None:
        """Decode these chunks too, whose records are lost."""
        self.chunks.extend(chunks)
        self.total, self.records = len(self.chunks), None

    def decode(self, seconds: float) -> None:
        """Decode for ``seconds`` seconds, or until all chunks are finished.

        Raise UserError if an image cannot be read, OSError if a chunk cannot be stored.
        """
        if self.records is None:
            self.records = self.file.read_records()
        deadline = time.monotonic() + seconds
        if self.threads == 1:  # a user's dataset may hold objects of this thread, such as a connection to a database
            self._decode_until(deadline, self.records)
            return
        before = torch.get_num_threads()
        try:  # each thread of Python has its own number of torch's threads
            with ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                try:
                    started = [pool.submit(self._decode_until, deadline, self.records) for _ in range(self.threads)]
                    for future in started:
                        future.result()
                except BaseException:  # also Ctrl-C: the block waits for the threads
                    self.failed = True
                    raise
        finally:
            torch.set_num_threads(before)

    def _decode_until(self, deadline: float, records: dict[int, tuple[int, str]]) -> None:
        while time.monotonic() < deadline and not self.failed:
            try:
                chunk = self.chunks.popleft()
            except IndexError:
                return
            try:
                stamp = stamp_of_chunk(self.file, self.dataset, chunk)
                checksum, written = records.get(chunk, (0, ""))
                if written != stamp or not self.file.has_chunk(self.file.partial, chunk, checksum):
                    samples = self._read(chunk, deadline)
                    if samples is None:
                        self.chunks.appendleft(chunk)
                        return
                    self.file.write_chunk(chunk, stamp, samples)
            except BaseException:
                self.failed = True
                raise
            if self.progress is not None:
                self.progress.update(lambda: 1 - len(self.chunks) / self.total)

    def _read(self, chunk: int, deadline: float) -> list[tuple[Tensor, int]] | None:
        """Return the samples of a chunk, or None if they are not complete in time; the next call continues."""
        samples = self.unfinished.pop(chunk, [])
        for row in self.file.rows(chunk)[len(samples) :]:
            if time.monotonic() >= deadline:
                self.unfinished[chunk] = samples
                return None
            try:
                samples.append(self.dataset[row])
            except UserError:
                raise
            except Exception as error:  # not one of the cache's files
                log = log_traceback(error)
                log_hint = f"; its traceback is in {log}" if log else ""
                raise UserError(
                    f"{self.dataset.name(row)}: {describe_error(error)}; fix the dataset{log_hint}"
                ) from error
            self.samples_read += 1
        return samples
