"""The test helpers that run commands, in forked processes or not."""

import pytest
from conftest import run_command
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


LINES = """
import os, sys, torch.distributed as dist
rank, address, port = (os.environ[name] for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
store = dist.TCPStore(address, int(port), 2, is_master=rank == "0")  # waits for both ranks
for number in range(2000):
    for stream in (sys.stdout, sys.stderr):
        print("rank", rank, "line", number, file=stream)
"""


def test_lines_of_several_ranks_are_not_mixed(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(LINES)
    result = run_ranks(2, script).succeeded()
    lines = sorted(f"rank {rank} line {number}" for rank in range(2) for number in range(2000))
    assert sorted(result.stdout.splitlines()) == lines
    assert sorted(result.stderr.splitlines()) == lines


def test_failed_rank_ends_the_others(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    result = run_ranks(2, script, "fail")
    assert (result.status, result.stdout) == (3, "")


def test_an_orphan_that_keeps_the_output_open_is_killed_and_the_output_shown():
    shown = r"open, after 1 s: .*\nstatus -11\n--- stdout\noutput\n"
    with pytest.raises(pytest.fail.Exception, match=shown):
        run_command("sh", "-c", "echo output; sleep 1000 & kill -SEGV $$", timeout=1)
