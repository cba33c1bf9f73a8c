"""Preflight on several ranks of one machine; faulty_preflight.py simulates faults."""

import json
from pathlib import Path

import pytest
from forked import run_python, run_ranks

from distlenet.prove.processes import free_port

pytestmark = pytest.mark.ranks

FAULTY = Path(__file__).parent / "faulty_preflight.py"
DIGITS = ("data.name=digits", "device=cpu")


def test_all_checks_pass_and_the_network_is_timed(tmp_path):
    command = ("-m", "distlenet.preflight", *DIGITS, f"run.dir={tmp_path}/runs", "--allreduce", "--json")
    result = run_ranks(2, *command).succeeded()
    (line,) = result.stdout.splitlines()
    report = json.loads(line)
    assert report["good"]
    assert report["world_size"] == 2
    checks = {check["name"]: check for check in report["checks"]}
    assert {
        "versions",
        "devices",
        "run directory",
        "disk space",
        "data",
        "all-reduce",
        "training step",
    } <= checks.keys()
    assert "sums right" in checks["all-reduce"]["found"]
    timing = report["all_reduce"]
    assert timing["ranks"] == 2
    assert list(timing["seconds"]) == [str(4**k) for k in range(1, 14)]
    assert all(seconds > 0 for seconds in timing["seconds"].values())
    assert timing["latency_s"] + timing["seconds_per_byte"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("torch", "FAIL  versions        torch 2."),
        ("gpu", "FAIL  devices         device=cuda: 2 ranks on "),
        ("settings", "FAIL  settings        differ: "),
    ],
)
def test_a_rank_that_differs_is_reported(tmp_path, fault, line):
    result = run_ranks(2, FAULTY, fault, *DIGITS, f"run.dir={tmp_path}")
    assert result.status != 0
    failed = [text for text in result.stdout.splitlines() if text.startswith("FAIL")]
    assert len(failed) == 1, str(result)
    assert failed[0].startswith(line), str(result)
    # A set: on a busy machine, rank 1 does not wait long enough for rank 0, and repeats the line.
    assert {text for text in result.stderr.splitlines() if text.startswith("distlenet:")} == {
        "distlenet: preflight: 1 of 10 checks failed; see the table"
    }, str(result)
    assert "distlenet/preflight/" not in result.stderr, str(result)  # no traceback


def test_a_rank_that_reads_the_clock_of_its_node_late_is_no_fault(tmp_path):
    """On a busy machine, one rank may run seconds after another."""
    result = run_ranks(2, FAULTY, "clock", *DIGITS, f"run.dir={tmp_path}", "--json").succeeded()
    clocks = [check for check in json.loads(result.stdout)["checks"] if check["name"] == "clocks"]
    assert [(check["status"], check["found"]) for check in clocks] == [("ok", "within 0.01 s")]


def test_cuda_is_not_initialized_for_the_cpu(tmp_path):
    """It would wait for GPU 0, and take some of its memory, on every rank."""
    command = (FAULTY, "cuda", *DIGITS, f"run.dir={tmp_path}", "--json")
    assert json.loads(run_ranks(2, *command).succeeded().stdout)["good"]


def test_a_missing_rank_is_reported(tmp_path):
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    env = {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = ("-m", "distlenet.preflight", *DIGITS, "--wait", "2")
    result = run_python(*command, env=env)
    assert result.status == 2
    assert "FAIL  ranks" in result.stdout
    assert "rank 1 did not join in time" in result.stdout
