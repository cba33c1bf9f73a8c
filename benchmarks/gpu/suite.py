"""The tests that need a GPU."""

import importlib.util
import re
import subprocess
import sys

from gpu.options import Options
from gpu.result import Result, listing

AT_ONCE = 8  # test processes, if pytest-xdist is installed
LIMIT_S = 150.0


def ask(result: Result, options: Options) -> None:  # noqa: ARG001
    """Run tests/ranks/test_cuda.py."""
    words = ["-p", "no:cacheprovider", "-q", "-rfEs", "--tb=line", "tests/ranks/test_cuda.py"]
    if importlib.util.find_spec("xdist"):
        words += ["-n", str(AT_ONCE)]
    if importlib.util.find_spec("pytest") is None:
        result.promise("tests/ranks/test_cuda.py passes", False, "pytest is not installed")
        return
    process = subprocess.Popen([sys.executable, "-m", "pytest", *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if line.startswith(("FAILED", "ERROR", "SKIPPED")) or " in " in line:
            shown = [text for text in lines if re.match("FAILED|ERROR|SKIPPED|=*.* in [0-9.]+s", text)]
            result.show("tests", listing("\n".join(shown)))
    status = process.wait()
    last = lines[-1] if lines else ""
    passed = status == 0 and "skipped" not in last and "passed" in last
    result.promise("tests/ranks/test_cuda.py passes, no test skipped", passed, last)
