"""TensorBoard's event files, rewritten from ``metrics.jsonl`` at each start of a run."""

import shutil
from pathlib import Path

from distlenet.tracking.base import Record


class TensorBoard:
    """Write each number of each record as a scalar over optimizer steps, to ``RUN/tensorboard``."""

    def __init__(self, run_dir: Path) -> None:
        """Remove the files of earlier starts: they may contain steps that are trained again."""
        from tensorboard.summary import Writer

        shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
        self.writer = Writer(str(run_dir / "tensorboard"))

    def put(self, record: Record) -> None:
        """Write one record."""
        for key, value in record.items():
            if isinstance(value, int | float) and key not in ("step", "time"):
                tag = f"{record['split']}/{key}"
                self.writer.add_scalar(tag, value, record["step"], wall_time=record.get("time"))

    def flush(self) -> None:
        """Make the records visible."""
        self.writer.flush()

    def mark_replayed(self) -> None:
        """Do nothing: the files of earlier starts are removed already."""

    def finish(self, outcome: str, summary: Record, details: Record) -> None:  # noqa: ARG002
        """Close the file."""
        self.writer.close()
