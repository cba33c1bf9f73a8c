"""The log of a rank: its content, and that it never ends a training."""

import os
import signal

import pytest
import torch

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
