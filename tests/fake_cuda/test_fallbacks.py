"""Steps that are not captured."""

from pathlib import Path

import pytest

from fake_cuda.runner import run

pytestmark = pytest.mark.fake_cuda

WORDS = ("data.name=digits", "device=cuda", "train.max_steps=12", "run.report=never", "precision=fp32")


REASONS = {
    "DrawsOnHost": "the step cannot be captured, so it runs eagerly: the step draws random numbers on the host",
    "ReplacesBuffer": "the step cannot be captured, so it runs eagerly: the step replaces a buffer, instead of writing "
    "to it",
    "Unused": "no graph, because with distributed.find_unused_parameters=true, DistributedDataParallel waits for the "
    "GPU",
}


@pytest.mark.parametrize("task", REASONS)
def test_step_that_a_replay_would_not_repeat_runs_eagerly(task, tmp_path):
    """A replay would repeat the branch of its capture, or begin with the same buffer. Two ranks: one line."""
    settings = (f"task.name=fake_cuda.fallbacks:{task}", "distributed.find_unused_parameters=true")
    ended = run("-m", "distlenet.train", *WORDS, *settings, f"run.dir={tmp_path}", ranks=2).succeeded()
    assert ended.stderr.splitlines() == [f"distlenet: train.cuda_graph=auto: {REASONS[task]}"]


def test_batch_larger_than_the_data_set_takes_no_memory(tmp_path):
    """The values and indices of recent steps are kept: 800 GB for as many samples as the setting allows."""
    settings = ("train.global_batch_size=1000000000", "train.epochs=1", "data.synthetic_train=173")
    run("-m", "distlenet.train", *WORDS, "data.name=synthetic", *settings, f"run.dir={tmp_path}").succeeded()


def test_failure_of_nccl_in_a_capture_ends_the_run(tmp_path):
    """Nothing reports that NCCL is usable afterwards."""
    ended = run(Path(__file__).parent / "fallbacks.py", *WORDS, f"run.dir={tmp_path}")
    assert ended.status == 1
    assert "DistBackendError: NCCL error: unhandled cuda error" in ended.stderr
    assert "NCCL cannot be captured; give train.cuda_graph=off" in ended.stderr
    assert "runs eagerly" not in ended.stderr
