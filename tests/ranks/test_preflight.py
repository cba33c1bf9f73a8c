"""Preflight on several ranks of one machine, with faults that a rank reports."""

import json
import sys
from pathlib import Path

import pytest
from conftest import run_command, run_torchrun

pytestmark = pytest.mark.ranks

LYING = Path(__file__).parent / "lying_preflight.py"
DIGITS = ("data.name=digits", "device=cpu")


def test_all_is_well_and_the_network_is_measured(tmp_path):
    words = ("-m", "distlenet.preflight", *DIGITS, f"run.dir={tmp_path}/runs", "--allreduce", "--json")
    ended = run_torchrun(2, *words).succeeded()
    (line,) = ended.stdout.splitlines()
    report = json.loads(line)
    assert report["good"]
    assert report["world_size"] == 2
    checks = {check["name"]: check for check in report["checks"]}
    assert {"versions", "devices", "run folder", "room", "data", "all-reduce", "training step"} <= checks.keys()
    assert "sums right" in checks["all-reduce"]["found"]
    timing = report["all_reduce"]
    assert timing["ranks"] == 2
    assert list(timing["seconds"]) == [str(4**k) for k in range(1, 14)]
    assert all(seconds > 0 for seconds in timing["seconds"].values())
    assert timing["latency_s"] + timing["seconds_per_byte"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("lie", "line"),
    [
        ("torch", "FAIL  versions        torch 2."),
        ("clock", "FAIL  clocks          "),
        ("gpu", "FAIL  devices         ranks 0, 1 share one GPU, "),
        ("settings", "FAIL  settings        differ: "),
    ],
)
def test_a_rank_that_differs_is_named(tmp_path, lie, line):
    ended = run_torchrun(2, LYING, lie, *DIGITS, f"run.dir={tmp_path}")
    assert ended.status != 0
    failed = [text for text in ended.stdout.splitlines() if text.startswith("FAIL")]
    assert len(failed) == 1, str(ended)
    assert failed[0].startswith(line), str(ended)
    assert [text for text in ended.stderr.splitlines() if text.startswith("distlenet:")] == [
        "distlenet: preflight: 1 of 11 checks failed; see the table"
    ], str(ended)
    assert "distlenet/preflight.py" not in ended.stderr, str(ended)  # no traceback of ours


def test_two_ranks_on_one_machine_that_do_not_meet(tmp_path):
    """Rank 0 of two waits, and says who is missing."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    env = {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "20571"}
    words = (sys.executable, "-m", "distlenet.preflight", *DIGITS, "--wait", "2")
    ended = run_command(*words, env=env)
    assert ended.status == 2
    assert "FAIL  ranks" in ended.stdout
    assert "rank 1 did not come in time" in ended.stdout
