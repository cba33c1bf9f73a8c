"""The byte offsets of the images in tar files: the headers are read once, and a file next to them keeps the result."""

import contextlib
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlenet.images.decoding import IMAGE_SUFFIXES, is_color
from distlenet.utils.errors import UserError
from distlenet.utils.files import replace_text

INDEX_NAME = ".distlenet-index.json"


@dataclass(frozen=True)
class Entry:
    """One image in a shard: its key, and the place of its bytes."""

    shard: Path
    key: str
    offset: int
    size: int
    label: int

    def read(self) -> bytes:
        """Return the bytes of the image file. Raise OSError."""
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class Shard:
    """The images of a tar file, in their order, and whether one of them is in color."""

    entries: tuple[Entry, ...]
    color: bool
    stamp: tuple[int, int]  # size and modification time of the file, before its headers were read


def read_shards(root: Path, paths: Sequence[Path]) -> dict[Path, Shard]:
    """Return the content of the shards ``paths`` below ``root``, by path.

    The record of a shard in ``root``/INDEX_NAME is used if size and modification time are the same; otherwise the
    headers are read, and the file is replaced. It is only a cache: a damaged one is ignored, and so is a failure to
    write it.
    Raise UserError if a shard is damaged, or if an image has no label.
    """
    saved, shards, records = _read_index(root), {}, {}
    for path in paths:
        name, stamp = str(path.relative_to(root)), _stamp(path)  # before the headers are read
        shard = _from_record(path, saved.get(name), stamp) or _read_shard(path, stamp)
        places = [[entry.key, entry.offset, entry.size, entry.label] for entry in shard.entries]
        shards[path] = shard
        record = {"stamp": stamp, "color": shard.color, "images": places}
        records[name] = {**record, "digest": _digest(record)}
    if records != saved:
        _write_index(root, records)
    return shards


def _stamp(path: Path) -> list[int]:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"data {path}: cannot be read: {error.strerror or error}; replace or remove it") from error
    return [status.st_size, status.st_mtime_ns]


def _read_index(root: Path) -> dict[str, Any]:
    try:
        records = json.loads((root / INDEX_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return records if isinstance(records, dict) else {}


def _from_record(path: Path, record: Any, stamp: list[int]) -> Shard | None:
    """Return the shard that a record of the index describes, or None if it is of another state of the file."""
    try:
        if record["stamp"] != stamp or record["digest"] != _digest({k: record[k] for k in record if k != "digest"}):
            return None
        entries = (Entry(path, str(k), int(offset), int(size), int(n)) for k, offset, size, n in record["images"])
        return Shard(tuple(entries), bool(record["color"]), (stamp[0], stamp[1]))
    except (LookupError, TypeError, ValueError):
        return None


def _digest(record: dict[str, Any]) -> str:
    """Return 16 hex digits, so that a damaged record is not used: its offsets and labels could be wrong."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def _write_index(root: Path, records: dict[str, Any]) -> None:
    """Replace the index. Several jobs may read and write it at the same time."""
    with contextlib.suppress(OSError):  # the directory may be read-only
        replace_text(root / INDEX_NAME, json.dumps(records), durable=False)


def _read_shard(shard: Path, stamp: list[int]) -> Shard:
    """Read all headers of a shard."""
    places: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                key, _, suffix = member.name.removeprefix("./").rpartition(".")
                if not member.isfile():
                    continue
                if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                    places[key] = (member.offset_data, member.size)
                elif suffix == "cls" and (content := archive.extractfile(member)) is not None:
                    labels[key] = int(content.read(32))
    except (OSError, tarfile.TarError, ValueError) as error:
        raise UserError(f"data {shard}: cannot be read: {error}; expected a tar file with integers in .cls") from error
    for key in places:
        if labels.get(key, -1) < 0:
            raise UserError(f"data {shard}: {key} has no {key}.cls with an integer of at least 0; add it")
    entries = tuple(Entry(shard, key, offset, size, labels[key]) for key, (offset, size) in places.items())
    return Shard(entries, any(map(_is_color, entries)), (stamp[0], stamp[1]))


def _is_color(entry: Entry) -> bool:
    """Return whether an image is in color; False if it cannot be read: decoding reports it."""
    try:
        return is_color(io.BytesIO(entry.read()))
    except OSError:
        return False
