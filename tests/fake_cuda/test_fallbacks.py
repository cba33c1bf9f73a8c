"""Steps that are not captured."""

from pathlib import Path

import pytest

from fake_cuda.runner import run

pytestmark = pytest.mark.fake_cuda

WORDS = ("data.name=digits", "device=cuda", "train.max_steps=12", "run.report=never", "precision=fp32")


def test_step_that_draws_on_the_host_is_not_frozen(tmp_path):
    """A replay would repeat the branch of its capture. Two ranks: one line."""
    task = "task.name=fake_cuda.fallbacks:DrawsOnHost"
    ended = run("-m", "distlenet.train", *WORDS, task, f"run.dir={tmp_path}", ranks=2).succeeded()
    reason = "the step cannot be captured, so it runs eagerly: the step draws random numbers on the host"
    assert ended.stderr.splitlines() == [f"distlenet: train.cuda_graph=auto: {reason}"]


def test_failure_of_nccl_in_a_capture_ends_the_run(tmp_path):
    """Nothing says that NCCL is usable afterwards."""
    ended = run(Path(__file__).parent / "fallbacks.py", *WORDS, f"run.dir={tmp_path}")
    assert ended.status == 1
    assert "DistBackendError: NCCL error: unhandled cuda error" in ended.stderr
    assert "NCCL cannot be captured; give train.cuda_graph=off" in ended.stderr
    assert "runs eagerly" not in ended.stderr
