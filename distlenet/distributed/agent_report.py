"""What torchrun's agent reports of a failed rank."""

import contextlib
import json
import os
import time
from pathlib import Path


def record_failure(text: str) -> None:
    """Give torchrun the reason why this rank fails: its report then contains it. Without torchrun, do nothing.

    torch's ``record`` would write a traceback also for an error of the user.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": text, "timestamp": str(int(time.time()))}  # what torchrun reads
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": details}}))
