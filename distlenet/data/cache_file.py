"""A file of decoded images: chunks with checksums, which are written in any order, and a table of them at the end.

The file gets its name when it is complete. Until then it is a .partial file, and a .chunks file has a line for each
written chunk: its number, its CRC-32, and a stamp of the image files. A killed job and a damaged image leave both, and
the next job decodes only the other chunks.
"""

import contextlib
import hashlib
import json
import math
import os
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distlenet.distributed.watchdog import restart_time_limit

CHUNK_IMAGES, CHUNK_BYTES = 64, 2**24  # at most, but at least one image: each thread holds a chunk in memory
CHECKED_BYTES = 2**29  # bytes of a larger file that are verified when it is opened, in evenly spaced chunks
LABEL_BYTES = 8
DIGEST_BYTES, LENGTH_BYTES = 32, 8  # of the table, at the end of the file


@dataclass(frozen=True)
class CacheFile:
    """Images of one shape, uint8 (N, *shape), in a file, followed by labels, int64 (N,), if ``labels``."""

    path: Path
    part: Path  # of the incomplete file, with another suffix; the same if image files change
    images: int
    shape: tuple[int, ...]
    labels: bool = False

    @property
    def partial(self) -> Path:
        """The path of the file until it is complete."""
        return self.part.with_suffix(".partial")

    @property
    def records(self) -> Path:
        """The path of the checksums of the written chunks, until the file is complete."""
        return self.part.with_suffix(".chunks")

    @property
    def image_bytes(self) -> int:
        """The number of bytes of an image."""
        return math.prod(self.shape)

    @property
    def labels_start(self) -> int:
        """The offset of the labels, after the images."""
        return -(-self.images * self.image_bytes // LABEL_BYTES) * LABEL_BYTES

    @property
    def nbytes(self) -> int:
        """The number of bytes of all images and labels."""
        return self.labels_start + LABEL_BYTES * self.images * self.labels

    @property
    def chunk_images(self) -> int:
        """The number of images of a chunk."""
        return max(1, min(CHUNK_IMAGES, CHUNK_BYTES // max(1, self.image_bytes)))

    @property
    def chunks(self) -> int:
        """The number of chunks."""
        return -(-self.images // self.chunk_images)

    def rows(self, chunk: int) -> range:
        """Return the numbers of the images of a chunk."""
        return range(chunk * self.chunk_images, min((chunk + 1) * self.chunk_images, self.images))

    def create(self) -> None:
        """Create the incomplete file, or keep the one of an earlier job. Raise OSError."""
        with open(self.partial, "ab") as file:
            file.truncate(self.nbytes)

    def write_chunk(self, chunk: int, stamp: str, samples: Iterable[tuple[Tensor, int]]) -> None:
        """Write the samples of a chunk, then its record with the ``stamp`` of the image files. Raise OSError.

        Two jobs may write the same chunk, if the file system has no locks: they write the same bytes.
        """
        checksum, labels = 0, []
        with open(self.partial, "r+b") as file:
            file.seek(self._places(chunk)[0][0])
            for image, label in samples:
                pixels = image.contiguous().numpy().tobytes()
                checksum = zlib.crc32(pixels, checksum)
                file.write(pixels)
                labels.append(label)
            for start, _ in self._places(chunk)[1:]:
                content = torch.tensor(labels, dtype=torch.int64).numpy().tobytes()
                checksum = zlib.crc32(content, checksum)
                file.seek(start)
                file.write(content)
        line = f"\n{chunk} {checksum} {stamp}\n".encode()  # after a power cut, half a line may precede it
        with open(self.records, "ab", buffering=0) as records:
            if records.write(line) != len(line):
                raise OSError(f"{self.records}: a line was written in part")

    def read_records(self) -> dict[int, tuple[int, str]]:
        """Return the checksums and stamps of the written chunks, by their numbers. A damaged line is ignored."""
        found = {}
        with contextlib.suppress(FileNotFoundError):
            for line in self.records.read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    chunk, checksum, stamp = line.split(" ")
                    found[int(chunk)] = int(checksum), stamp
        return found

    def has_chunk(self, path: Path, chunk: int, checksum: int) -> bool:
        """Return whether the file at ``path`` has the chunk with this checksum. After a power cut it may not."""
        found = 0
        with open(path, "rb") as file:
            for start, size in self._places(chunk):
                file.seek(start)
                found = zlib.crc32(file.read(size), found)
        return found == checksum

    def finish(self) -> list[int]:
        """Write the table of all checksums, and give the file its name. Raise OSError.

        If chunks have no record, only return their numbers.
        """
        records = self.read_records()
        if missing := [chunk for chunk in range(self.chunks) if chunk not in records]:
            return missing
        written = int(time.time())  # also the modification time, which a later change of the file changes
        table = {"checksums": [records[chunk][0] for chunk in range(self.chunks)], "written": written}
        content = json.dumps(table).encode()
        with open(self.partial, "r+b") as file:
            file.truncate(self.nbytes)
            file.seek(self.nbytes)
            file.write(content + hashlib.sha256(content).digest() + len(content).to_bytes(LENGTH_BYTES))
            file.flush()
            os.fsync(file.fileno())
        os.utime(self.partial, (written, written))
        os.replace(self.partial, self.path)
        self.records.unlink(missing_ok=True)
        return []

    def is_intact(self) -> bool:
        """Verify the complete file: size, table and chunks. If its time has changed or it is small, verify all chunks.

        Return False if there is none. Raise OSError if it cannot be read: it may be intact.
        """
        try:
            checksums, written = self._read_table()
            changed = self.path.stat().st_mtime != written
            spacing = 1 if changed else -(-self.nbytes // CHECKED_BYTES)
            for chunk in (*range(0, self.chunks - 1, spacing), self.chunks - 1):
                restart_time_limit()
                if not self.has_chunk(self.path, chunk, checksums[chunk]):
                    return False
        except (FileNotFoundError, ValueError):
            return False
        if changed:
            with contextlib.suppress(OSError):  # another user's file
                os.utime(self.path, (written, written))  # the next start verifies a part
        return True

    def reopen(self, stamps: Iterable[str]) -> None:
        """Make a damaged file an incomplete one, whose intact chunks are kept. Raise OSError.

        ``stamps`` are those of the chunks.
        """
        self.records.unlink(missing_ok=True)
        with contextlib.suppress(ValueError):
            checksums, _ = self._read_table()
            lines = (f"{chunk} {each[0]} {each[1]}\n" for chunk, each in enumerate(zip(checksums, stamps, strict=True)))
            self.records.write_text("".join(lines))
        os.replace(self.path, self.partial)

    def remove_partial(self) -> None:
        """Remove what an incomplete file takes."""
        with contextlib.suppress(OSError):
            self.partial.unlink(missing_ok=True)
            self.records.unlink(missing_ok=True)

    def _places(self, chunk: int) -> list[tuple[int, int]]:
        """Return start and size of the images of a chunk, and of its labels."""
        rows = self.rows(chunk)
        images = rows.start * self.image_bytes, len(rows) * self.image_bytes
        labels = self.labels_start + rows.start * LABEL_BYTES, len(rows) * LABEL_BYTES
        return [images, labels] if self.labels else [images]

    def _read_table(self) -> tuple[Sequence[int], int]:
        """Return the checksums and the time of the complete file. Raise ValueError if they are damaged, OSError."""
        with open(self.path, "rb") as file:
            file.seek(self.nbytes)
            tail = file.read()
        content, rest = tail[: -DIGEST_BYTES - LENGTH_BYTES], tail[-DIGEST_BYTES - LENGTH_BYTES :]
        if rest != hashlib.sha256(content).digest() + len(content).to_bytes(LENGTH_BYTES):
            raise ValueError(f"{self.path} is damaged")
        table = json.loads(content)
        return table["checksums"], table["written"]
