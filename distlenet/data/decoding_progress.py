"""The display of a long decoding: a bar on a terminal, else a line from time to time, on standard error."""

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from distlenet.utils.errors import warn

QUIET_S = 10.0  # a shorter decoding prints nothing without a terminal
LINE_S = 60.0


class DecodingProgress:
    """Show the share of ``images`` images that is decoded. The first line contains the ``path``. Thread-safe."""

    def __init__(self, images: int, path: Path, nbytes: int) -> None:
        self.images, self.started = images, time.monotonic()
        size = f"{nbytes / 1e9:.1f} GB"
        self.first_line = f"decoding {images:,} images into {path} ({size}), once, for this and later jobs"
        self.next_line = self.started + QUIET_S
        self.lock = threading.Lock()
        self.bar: Progress | None = None
        if sys.stderr is not None and sys.stderr.isatty():
            columns = TextColumn(f"decoding {images:,} images"), BarColumn(), TimeRemainingColumn()
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task("", total=1.0)

    def update(self, current_share: Callable[[], float]) -> None:
        """Show the share, from 0 to 1, that ``current_share`` returns when it is this thread's turn."""
        with self.lock:
            now = time.monotonic()
            if self.bar is None and now < self.next_line:
                return
            self.next_line, share = now + LINE_S, current_share()
            if self.first_line:
                warn(self.first_line)
                self.first_line = ""
            if self.bar is not None:
                self.bar.start()
                self.bar.update(self.task, completed=share)
                return
            left_s = (now - self.started) * (1 - share) / share
            warn(f"decoding {self.images:,} images: {share:.0%}, about {left_s:.0f} s left")

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.stop()
