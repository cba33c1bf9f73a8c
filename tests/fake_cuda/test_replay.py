"""A replayed step is the eager step, to the last bit, on one rank and on two."""

import json
from pathlib import Path

import pytest

from fake_cuda.runner import run

pytestmark = pytest.mark.fake_cuda

PROGRAM = Path(__file__).parent / "replay_program.py"
HALVES = (
    ["fp32", "bf16", "exact", "streamed", "mixed", "weighted"],
    ["augmented", "dropout", "dropout, exact", "large", "compressed", "groups"],
)
KINDS = 3  # of steps: of the full batch, with and without the norm of the gradient, and of the short one of an epoch
CLIPPED = 2  # all steps have the norm
EAGER = {"large": 11, "compressed": 11}  # steps before the capture, a short one among them


def check(rows, names, ranks):
    assert [row["case"] for row in rows] == [name for name in names for _ in range(ranks)]
    for row in rows:
        assert row["different"] == [], row["case"]
        assert row["records_equal"], row["case"]  # losses and norms of gradients
        assert row["settings_equal"], row["case"]  # of the optimizer: a step leaves no tensors in them
        assert row["timed"] == [True] * 3, row["case"]  # one per epoch, of a replayed step except for the first
        steps = row["records"][-1][1]
        assert row["captures"] == [0, CLIPPED if row["case"] == "exact" else KINDS], row["case"]
        assert row["replays"] == [0, steps - EAGER.get(row["case"], 3 + 1)], row["case"]


def run_cases(names, ranks=1):
    """Return the rows that all ranks printed."""
    printed = run(PROGRAM, *names, ranks=ranks).succeeded().stdout
    return [json.loads(line[line.index("{") :]) for line in printed.splitlines() if "{" in line]


@pytest.mark.parametrize("names", HALVES, ids=["first half", "second half"])
def test_replayed_steps_equal_eager_steps(names):
    check(run_cases(names), names, ranks=1)


def test_replayed_steps_of_two_ranks_equal_eager_steps():
    """The sums of the exact ones are those of one rank."""
    names = ["fp32", "streamed", "dropout, exact", "large", "uneven"]
    rows = run_cases(names, ranks=2)
    check(rows, names, ranks=2)
    (one,) = run_cases(["dropout, exact"])
    assert [row["records"] for row in rows if row["case"] == "dropout, exact"] == [one["records"]] * 2
