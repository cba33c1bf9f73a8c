"""The device of each rank, if ranks see all GPUs, one each, or the same one."""

from pathlib import Path

import pytest

from fake_cuda.runner import run

pytestmark = pytest.mark.fake_cuda

PROGRAM = Path(__file__).parent / "own_gpus.py"


@pytest.mark.parametrize(("seen", "devices"), [("0/1", "00"), ("0,1/0,1", "01")])
def test_each_rank_uses_a_separate_gpu(seen, devices):
    ended = run(PROGRAM, seen, ranks=2).succeeded()
    lines = [f"rank {rank} of 2: cuda:{index}, nccl" for rank, index in enumerate(devices)]
    assert sorted(ended.stdout.splitlines()) == lines
    assert ended.stderr == ""  # no warning, such as of the old name of a variable


def test_ranks_that_see_one_gpu_use_the_cpu():
    ended = run(PROGRAM, "0/0", ranks=2).succeeded()
    assert sorted(ended.stdout.splitlines()) == [f"rank {rank} of 2: cpu, gloo" for rank in range(2)]
    (warning,) = [line for line in ended.stderr.splitlines() if line.startswith("distlenet: ")]
    assert warning.endswith("share 1 GPU; start one rank per GPU")
