"""Run one question: ``child.py MODULE:FUNCTION RESULT_FILE OPTIONS``."""

import pkgutil
import sys
from pathlib import Path

from gpu.options import from_json
from gpu.result import Result

if __name__ == "__main__":
    function, path, options = sys.argv[1:]
    pkgutil.resolve_name(function)(Result(Path(path)), from_json(options))
