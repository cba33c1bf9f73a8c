"""Run one question: ``child.py MODULE:FUNCTION RESULT_FILE OPTIONS``."""

import pkgutil
import signal
import sys
from pathlib import Path

from gpu.options import from_json
from gpu.result import Result

if __name__ == "__main__":
    function, path, options = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so its children
    pkgutil.resolve_name(function)(Result(Path(path)), from_json(options))
