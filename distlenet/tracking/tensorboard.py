"""TensorBoard's event files, written anew from ``metrics.jsonl`` at each start of a run."""

import shutil
from pathlib import Path

from distlenet.tracking.base import Record


class TensorBoard:
    """Writes each number of each record as a scalar over optimizer steps, below ``RUN/tensorboard``."""

    def __init__(self, folder: Path) -> None:
        """Begin with no file: those of an earlier start may hold steps that are trained again."""
        from tensorboard.summary import Writer

        target = folder / "tensorboard"
        shutil.rmtree(target, ignore_errors=True)
        self.writer = Writer(str(target))

    def put(self, record: Record) -> None:
        """Write one record."""
        for key, value in record.items():
            if isinstance(value, int | float) and key not in ("step", "time"):
                tag = f"{record['split']}/{key}"
                self.writer.add_scalar(tag, value, record["step"], wall_time=record.get("time"))

    def mark_replayed(self) -> None:
        """Show what there is."""
        self.writer.flush()

    def finish(self, outcome: str, summary: Record, details: Record | None) -> None:  # noqa: ARG002
        """Close the file."""
        self.writer.close()
