"""Which samples each rank consumed, on disk, so that anyone can check that an epoch used each of them once.

``RUN/ledger/0002-from-00000040/`` belongs to the second start of a run, which went on after step 40. In it
``start.json`` has the facts of that start, and ``rank-00003.jsonl`` one line per optimizer step of rank 3.
Lines are only ever added. A step that a later start trained again counts in that start alone.
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
from distlenet.utils.files import LineFile, told
from distlenet.utils.structure import check_same_structure

START = re.compile(r"(\d+)-from-(\d+)")


class NoSampleLog:
    """Records nothing."""

    has_unwritten_lines = False

    def record(self, epoch: int, step: int, indices: Tensor) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class SampleLog(NoSampleLog):
    """Record the samples of one rank."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Write into ``folder``, which ``open_start`` made."""
        self.lines = LineFile(folder / f"rank-{rank:05d}.jsonl")

    @property
    def has_unwritten_lines(self) -> bool:  # type: ignore[override]
        """Whether lines are not on the disk: a checkpoint saved now could go on from where they are missing."""
        self.lines.flush()
        try:
            self.lines.sync()
        except OSError:
            return True
        return False

    def record(self, epoch: int, step: int, indices: Tensor) -> None:
        """Add a line, at once: the samples ``indices`` (n,) of the optimizer step that comes after ``step`` others."""
        self.lines.add(json.dumps({"epoch": epoch, "step": step, "indices": indices.tolist()}))

    def close(self) -> None:
        """Close the file."""
        self.lines.close()


def open_start(run: Path, step: int, facts: dict[str, Any]) -> Path:
    """Make the folder of a start that goes on after ``step`` steps, with its facts. Rank 0 alone calls it."""
    number = 1 + max((start.number for start in read_starts(run)), default=0)
    folder = run / "ledger" / f"{number:04d}-from-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "start.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
    return folder


def open_sample_log(run: Path, step: int, facts: dict[str, Any], rank: int) -> SampleLog:
    """Open this rank's ledger of the samples it takes from now on, after ``step`` steps. A collective."""
    folder: Path | None = None
    with raise_on_all_ranks():
        if rank == 0:
            with told(run):
                folder = open_start(run, step, facts)
    folder = broadcast_object(folder)
    assert folder is not None
    with raise_on_all_ranks(), told(run):
        return SampleLog(folder, rank)


@dataclass(frozen=True)
class Start:
    """One start of a run, as its ledger has it."""

    folder: Path
    number: int
    step: int

    def facts(self) -> dict[str, Any]:
        """Return the facts that ``open_start`` was given. Raises UserError where they are not there."""
        path = self.folder / "start.json"
        with _read(path):
            facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            check_same_structure({name: facts[name] for name in FACTS}, FACTS, "facts")
        return facts

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of all ranks; a last line that a kill cut short is none. Raises UserError."""
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            with _read(path):
                lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
                for line in lines:
                    like = {"epoch": 0, "step": 0, "indices": [0] * len(line["indices"])}
                    check_same_structure(line, like, "line")
            yield from lines


FACTS = {"samples": 0, "steps_per_epoch": 0, "global_batch_size": 0, "world_size": 0}
"""What a ledger's facts are like."""


@contextmanager
def _read(path: Path) -> Iterator[None]:
    """Raise UserError that names ``path`` where it cannot be read, or holds something else."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}; restore that file") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: is not as a run writes it ({reason}); restore that file") from error


def read_starts(run: Path) -> list[Start]:
    """Return a run's starts in their order."""
    found = []
    for folder in (run / "ledger").glob("*-from-*"):
        if match := START.fullmatch(folder.name):
            found.append(Start(folder, int(match[1]), int(match[2])))
    return sorted(found, key=lambda start: start.number)
