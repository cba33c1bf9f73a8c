"""The log of a rank: its content, and that it never ends a training."""

import faulthandler
import os
import signal
import sys

import pytest
import torch
from conftest import run_command

from distlenet.distributed.environment import DistributedEnvironment
from distlenet.distributed.rank_log import RankLog, format_environment
from distlenet.utils.errors import warn

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


def test_the_environment_without_secrets():
    logged = {"LOCAL_RANK": "3", "NCCL_DEBUG": "INFO", "SLURM_JOB_ID": "7", "WORLD_SIZE": "4"}
    logged["JOB_COMPLETION_INDEX"] = "0"
    hidden = {"MASTER_PASSWORD": "abc", "SLURM_JWT": "def", "TORCH_API_KEY": "ghi"}
    omitted = {"WANDB_API_KEY": "jkl", "AWS_SECRET_ACCESS_KEY": "mno", "HOME": "/home/me"}
    assert format_environment(logged | hidden | omitted) == (
        "JOB_COMPLETION_INDEX=0 LOCAL_RANK=3 MASTER_PASSWORD=(hidden) NCCL_DEBUG=INFO SLURM_JOB_ID=7 "
        "SLURM_JWT=(hidden) TORCH_API_KEY=(hidden) WORLD_SIZE=4"
    )


def test_warnings_and_stacks_are_logged_while_the_log_is_open(tmp_path, capfd):
    log = RankLog(DistributedEnvironment(rank=2, world_size=4), CPU)
    log.write("before")
    warn("not yet")
    log.open(tmp_path)
    path = tmp_path / "logs/rank-00002.log"
    warn("two\nlines")
    os.kill(os.getpid(), signal.SIGURG)
    log.write("the end")
    log.close()
    warn("no more")
    os.kill(os.getpid(), signal.SIGURG)  # ignored
    text = path.read_text()
    assert "rank 2 of 4 on " in text
    assert " UTC two lines\n" in text
    assert "test_rank_log.py" in text
    assert " UTC the end\n" in text
    assert not any(word in text for word in ("before", "not yet", "no more"))
    assert capfd.readouterr().err == "distlenet: not yet\ndistlenet: two lines\ndistlenet: no more\n"
    log.open(tmp_path)
    log.close()
    assert path.read_text().startswith(text)  # a later start appends


CRASH = """
import faulthandler, os, sys
from pathlib import Path
import torch
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.distributed.rank_log import RankLog

log = RankLog(DistributedEnvironment(), torch.device("cpu"))
log.open(Path("run"))
if sys.argv[1] == "closed":
    log.close()
    print(faulthandler.is_enabled(), flush=True)
file = open("other", "w")  # has the descriptor of the log, once that is closed
os.abort()
"""


@pytest.mark.parametrize("state", ["open", "closed"])
def test_the_stacks_of_a_crash_are_written_only_to_an_open_log(tmp_path, state):
    """As in a script or notebook that calls ``train``, without PYTHONFAULTHANDLER."""
    ended = run_command(sys.executable, "-c", CRASH, state, cwd=tmp_path, env={"PYTHONFAULTHANDLER": ""})
    assert ended.status == -signal.SIGABRT, str(ended)
    logged = "Fatal Python error" in (tmp_path / "run/logs/rank-00000.log").read_text()
    assert (logged, ended.stdout) == ((True, "") if state == "open" else (False, "False\n"))
    assert (tmp_path / "other").read_text() == ""


def test_closing_the_log_leaves_an_enabled_fault_handler_as_it_was(tmp_path):
    with (tmp_path / "stacks").open("w") as file:
        was_enabled = faulthandler.is_enabled()
        if not was_enabled:
            faulthandler.enable(file)
        try:
            log = RankLog(DistributedEnvironment(), CPU)
            log.open(tmp_path)
            log.close()
            assert faulthandler.is_enabled()
        finally:
            if not was_enabled:
                faulthandler.disable()


def test_a_log_that_cannot_be_opened_is_a_warning(tmp_path, capsys):
    (tmp_path / "logs").write_text("a file")
    log = RankLog(DistributedEnvironment(), CPU)
    log.open(tmp_path)
    log.write("lost")
    log.close()
    assert "logs/rank-00000.log: cannot be written" in capsys.readouterr().err


def test_a_full_disk_is_ignored(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank-00000.log").symlink_to("/dev/full")
    log = RankLog(DistributedEnvironment(), CPU)
    log.open(tmp_path)
    log.write("lost")
    log.close()
    assert capsys.readouterr().err == ""
