"""The test helpers that run commands in forked processes."""

import pytest
from forked import run_python, run_ranks

pytestmark = pytest.mark.unit

PROGRAM = """
import os, sys, time, torch.distributed as dist
assert dist.is_available() and __name__ == "__main__"
if sys.argv[1] == "fail" and os.environ["RANK"] == "1":
    sys.exit(3)
if sys.argv[1] == "fail":
    time.sleep(600)
print("rank", os.environ.get("RANK"), os.environ.get("EXTRA"))
print("to stderr", file=sys.stderr)
"""


def test_output_and_status(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    result = run_python(script, "pass", env={"EXTRA": "x"}).succeeded()
    assert (result.stdout, result.stderr) == ("rank None x\n", "to stderr\n")
    assert sorted(run_ranks(3, script, "pass").succeeded().stdout.splitlines()) == [f"rank {i} None" for i in range(3)]


def test_failed_rank_ends_the_others(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    result = run_ranks(2, script, "fail")
    assert (result.status, result.stdout) == (3, "")
