"""Record which samples each rank uses, so that ``distlenet.ledger`` can check that an epoch uses each of them once.

``RUN/ledger/0002-from-00000040/`` belongs to the second start of a run, which resumed after step 40: ``start.json``
describes that start, and ``rank-00003.jsonl`` has one line per optimizer step of rank 3. Lines are only appended; if a
later start repeats a step, only its lines count.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from distlenet.distributed.collectives import broadcast_object, raise_on_all_ranks
from distlenet.utils.errors import UserError
from distlenet.utils.files import LineFile, convert_io_errors
from distlenet.utils.structure import check_same_structure

START_DIRECTORY = re.compile(r"(\d+)-from-(\d+)")
START_INFO = dict.fromkeys(("samples", "steps_per_epoch", "global_batch_size", "world_size"), 0)  # the structure


class SampleLog:
    """Records the samples of one rank in a directory that ``create_start`` returned; without one, records nothing."""

    def __init__(self, directory: Path | None = None, rank: int = 0) -> None:
        self.lines = None if directory is None else LineFile(directory / f"rank-{rank:05d}.jsonl")

    def record(self, epoch: int, step: int, indices: Tensor) -> None:
        """Append a line, in memory while the disk is full: the samples ``indices`` (n,) of the step after ``step``."""
        if self.lines is not None:
            self.lines.add(json.dumps({"epoch": epoch, "step": step, "indices": indices.tolist()}))

    def flush(self) -> bool:
        """Write all lines to the disk; return whether that succeeded.

        Otherwise a run that resumed from now would miss them.
        """
        try:
            if self.lines is not None:
                self.lines.flush()
                self.lines.sync()
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Close the file."""
        if self.lines is not None:
            self.lines.close()


def open_sample_log(run_dir: Path, step: int, info: dict[str, Any], rank: int) -> SampleLog:
    """Open the log of a rank for a start after ``step`` steps, described by ``info``. A collective."""
    directory: Path | None = None
    with raise_on_all_ranks(), convert_io_errors(run_dir):  # a collective
        if rank == 0:
            directory = create_start(run_dir, step, info)
    directory = broadcast_object(directory)  # a collective
    assert directory is not None
    with raise_on_all_ranks(), convert_io_errors(run_dir):  # a collective
        return SampleLog(directory, rank)


def create_start(run_dir: Path, step: int, info: dict[str, Any]) -> Path:
    """Create the directory of a start after ``step`` steps. Only rank 0 calls it."""
    number = 1 + max((start.number for start in read_starts(run_dir)), default=0)
    directory = run_dir / "ledger" / f"{number:04d}-from-{step:08d}"
    directory.mkdir(parents=True)
    (directory / "start.json").write_text(json.dumps(info) + "\n", encoding="utf-8")
    return directory


@dataclass(frozen=True, order=True)
class Start:
    """One start of a run: its number from 1, the steps before it, and its directory."""

    number: int
    step: int
    directory: Path

    def read_info(self) -> dict[str, Any]:
        """Return the contents of ``start.json``. Raise UserError if it is unreadable or damaged."""
        path = self.directory / "start.json"
        with _name_file(path):
            info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            check_same_structure({key: info[key] for key in START_INFO}, START_INFO, "start")
        return info

    def read_lines(self) -> Iterator[dict[str, Any]]:
        """Yield the complete lines of all ranks. Raise UserError if a file is unreadable or damaged."""
        for path in sorted(self.directory.glob("rank-*.jsonl")):
            with _name_file(path):
                for text in path.read_text(encoding="utf-8").split("\n")[:-1]:  # a kill may truncate the last line
                    line = json.loads(text)
                    check_same_structure(line, {"epoch": 0, "step": 0, "indices": [0] * len(line["indices"])}, "line")
                    yield line


def read_starts(run_dir: Path) -> list[Start]:
    """Return the starts of a run in order."""
    matches = [(START_DIRECTORY.fullmatch(path.name), path) for path in (run_dir / "ledger").glob("*-from-*")]
    return sorted(Start(int(match[1]), int(match[2]), path) for match, path in matches if match)


@contextmanager
def _name_file(path: Path) -> Iterator[None]:
    """Raise UserError that names ``path`` if it cannot be read or parsed."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read or is damaged ({str(error)[:200]}); restore the file") from error
