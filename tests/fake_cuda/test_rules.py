"""The rules of CUDA and NCCL that the fake keeps: each is broken once."""

from pathlib import Path

import pytest

from fake_cuda.runner import run

pytestmark = pytest.mark.fake_cuda

HERE = Path(__file__).parent


def test_one_process():
    ended = run(HERE / "rules_program.py").succeeded()
    assert ended.stdout.endswith("\nall as on a GPU\n")


@pytest.mark.parametrize(
    ("what", "calls"),
    [
        ("numbers", None),
        ("order", ("ncclAllReduce of 3 float32", "ncclAllReduce of 4 float32")),
        ("one_captures", ("ncclAllReduce of 3 float32, operation 0, root -1, in a graph", "operation 0, root -1\n")),
    ],
)
def test_two_ranks(what, calls):
    ended = run(HERE / "ranks_program.py", what, ranks=2)
    if calls is None:
        assert ended.succeeded().stdout.splitlines() == ["as expected"] * 2
        return
    assert ended.status != 0
    assert "fake CUDA: collective " in ended.stderr
    for call in calls:
        assert call in ended.stderr
