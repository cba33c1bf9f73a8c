"""The benchmarks: their --help and their arithmetic, without measurements."""

import sys

import pytest
from conftest import REPO
from forked import run_python

pytestmark = pytest.mark.unit

sys.path.append(str(REPO / "benchmarks"))
import networks  # noqa: E402
import scaling  # noqa: E402
import throughput  # noqa: E402

PROGRAMS = sorted(path for path in (REPO / "benchmarks").glob("*.py") if path.name != "scaling.py")  # needs a launcher


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_help(program):
    assert "usage: " in run_python(program, "--help").succeeded().stdout


def test_batch_size_for_an_efficiency():
    """For 90 % efficiency and 1 s of all-reduce, a step must take 9 s: 1 s overhead and 8 images of 1.01 s."""
    assert scaling.batch_for(0.9, all_reduce=1.0, s=1.0, c=1.01) == 8


def test_ratios_are_computed_within_rounds():
    speeds = {"distlenet": [10.0, 20.0, 30.0], "peer": [5.0, 20.0, 10.0]}
    figures = {name: list(map(throughput.Figures, values, (2.0, 9.0, 3.0))) for name, values in speeds.items()}
    lines = throughput.table(figures)
    assert lines[2] == "| distlenet | 20 | 10 to 30 |  | 3.0 s |"
    assert lines[3] == "| peer | 10 | 5 to 20 | 2.00 × (1.00 to 3.00) | 3.0 s |"


def test_every_loop_takes_turns_and_lightning_takes_its_own_steps():
    """In each round, each takes one step that is not measured and two that are, and another one begins."""
    taken = []

    def loop(name):
        while True:
            taken.append(name)
            yield

    seconds = {"by hand": [], "ddp": [], networks.LIGHTNING: []}
    ways = {name: loop(name) for name in ("by hand", "ddp")}
    for _ in networks.take_turns(ways, 2, 2, seconds):
        taken.append(networks.LIGHTNING)
    hand, ddp, lightning = (3 * [name] for name in seconds)
    assert taken == hand + ddp + lightning + ddp + lightning + hand
    assert [len(times) for times in seconds.values()] == [2, 2, 2]
