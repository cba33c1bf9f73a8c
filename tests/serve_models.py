"""A server process."""

import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

from conftest import LIMIT_S, REPO, clean_environment
from model_files import CLASSES, IMAGES, write_model, write_text_version, write_version

__all__ = ["CLASSES", "IMAGES", "Server", "serving", "write_model", "write_text_version", "write_version"]


class Server:
    """A server process. ``url`` is where it answers."""

    def __init__(self, *words: object) -> None:
        command = [sys.executable, "-m", "distlenet.serve", *map(str, words), "--port", "0"]
        self.process = subprocess.Popen(
            command, cwd=REPO, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = re.search(r"at (http://127\.0\.0\.1:(\d+))$", line)
        if match is None:
            raise AssertionError(f"{line}{self.process.communicate(timeout=LIMIT_S)[1]}")
        self.url, self.port = match[1], int(match[2])

    def stop(self) -> tuple[int, str]:
        """Send SIGTERM; return the exit status and what the server has written to standard error."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        """Wait until the server exits; return the status and what it has written to standard error."""
        _, errors = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, errors


@contextlib.contextmanager
def serving(*words: object) -> Iterator[Server]:
    """Run a server; kill it at the end of the block if it still runs."""
    server = Server(*words)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()
