"""What the screen shows last when ranks fail."""

import sys

import pytest
from conftest import run_command

pytestmark = pytest.mark.ranks

AGENT = ("--standalone", "--nproc-per-node=2")
LAUNCH = (sys.executable, "-m", "distlenet.launch", *AGENT)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", *AGENT)
WRONG = ("-m", "distlenet.train", "optim.lr=-1")


@pytest.fixture
def program(tmp_path):
    """A program whose rank 1 fails as the argument selects."""
    path = tmp_path / "program.py"
    path.write_text(
        "import os, signal, sys, time\nfrom distlenet.distributed.entry_point import run_entry\n"
        "def main():\n"
        "    if os.environ['RANK'] == '0':\n        time.sleep(600)\n"
        "    if sys.argv[1] == 'raise':\n        raise MemoryError('no room')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "run_entry(main)\n"
    )
    return path


@pytest.mark.parametrize(
    ("more", "ends"),
    [
        ([], [f"rank {rank} exited with status 2; all ranks of this node have ended" for rank in (0, 1)]),
        (
            ["--max-restarts=3", "--log-dir=LOGS"],
            ["a rank exited with status 2, so it is not restarted; all ranks of this node have ended"],
        ),
    ],
)
def test_an_error_of_the_user_ends_the_output_and_gives_the_status(tmp_path, more, ends):
    more = [option.replace("LOGS", str(tmp_path / "logs")) for option in more]
    ended = run_command(*LAUNCH, *more, *WRONG, env={"TMPDIR": str(tmp_path)})
    assert ended.status == 2, str(ended)
    # On a busy machine, rank 1 does not wait long enough for rank 0, and repeats the line.
    reason, end = dict.fromkeys(ended.stderr.splitlines())
    assert reason.startswith("distlenet: optim.lr=-1"), str(ended)
    assert end in [f"distlenet: {line}" for line in ends]
    assert not list(tmp_path.glob("*elastic*"))  # that of torchrun
    assert not list(tmp_path.glob("distlenet*"))


def test_torchrun_reports_the_error_of_the_user():
    ended = run_command(*TORCHRUN, *WRONG)
    report = ended.stderr.partition("Root Cause")[2]
    assert "distlenet: optim.lr=-1" in report, str(ended)


@pytest.mark.parametrize(
    ("failure", "status", "lines"),
    [
        ("raise", 1, ["  MemoryError: no room", "distlenet: rank 1 exited with status 1"]),
        ("kill", 1, ["distlenet: rank 1 was killed by SIGKILL"]),
    ],
)
def test_a_failed_rank_is_named_in_one_line(program, failure, status, lines):
    ended = run_command(*LAUNCH, program, failure, env={"DISTLENET_WARM_START": "0"})
    assert ended.status == status, str(ended)
    lines[-1] += "; all ranks of this node have ended"
    assert ended.stderr.splitlines()[-len(lines) :] == lines, str(ended)


def test_the_rank_that_causes_a_restart_is_named(program):
    ended = run_command(*LAUNCH, "--max-restarts=1", program, "kill", env={"DISTLENET_WARM_START": "0"})
    assert ended.status == 1, str(ended)
    assert ended.stderr.splitlines() == [
        "distlenet: rank 1 was killed by SIGKILL; restarting the ranks of this node",
        "distlenet: rank 1 was killed by SIGKILL after 1 restart; all ranks of this node have ended",
    ], str(ended)
