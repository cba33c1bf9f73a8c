"""Ranks started by SLURM itself, with no torchrun, on a real cluster of two nodes."""

import json
import shlex
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import CommandResult

from cluster.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.cluster

LIMIT_S = 100.0  # of one command; several times what it needs on two cores
TRAIN = (sys.executable, "-m", "distlenet.train")
RESULT = "Accuracy of the network on the 360 test images"


@pytest.fixture(autouse=True)
def _no_job_left(slurm: SlurmCluster) -> Iterator[None]:
    yield
    slurm.cancel_all()


def settings(folder: Path, name: str) -> list[str]:
    run = [f"run.dir={folder}", f"run.name={name}"]
    return ["data.name=digits", "device=cpu", "train.epochs=2", "train.global_batch_size=64", "train.log_every=1", *run]


def check_trained(printed: str, folder: Path, world_size: int) -> None:
    """Check that one job of ``world_size`` ranks ran to its end, and spoke with one voice."""
    assert [RESULT in line for line in printed.splitlines()].count(True) == 1, printed
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    assert summary["world_size"] == world_size, printed
    assert summary["backend"] == "gloo", printed
    assert summary["test_count"] == 360, printed
    assert not set("\x1b\r") & set(printed), printed  # no colours, no bar
    records = len((folder / "metrics.jsonl").read_text().splitlines())
    assert records >= 46
    assert printed.count("  step ") <= records / 2, printed  # one in 5 s, not one for each


@pytest.mark.parametrize(
    ("tasks", "layout", "world_size", "overrides"),
    [
        pytest.param(["-n4", "--ntasks-per-node=2"], "2(x2)", 4, [], id="2+2"),
        pytest.param(["-n4"], "3,1", 4, [], id="3+1"),  # SLURM fills the first node
        pytest.param(["-n3"], "2,1", 3, ["train.global_batch_size=66"], id="2+1"),
    ],
)
def test_srun_starts_the_ranks(
    slurm: SlurmCluster, tmp_path: Path, tasks: list[str], layout: str, world_size: int, overrides: list[str]
) -> None:
    # The shell says what SLURM made of the request, so that the test knows which layout it has seen.
    shell = ("bash", "-c", 'echo "layout $SLURM_STEP_TASKS_PER_NODE"; exec "$@"', "task")
    words = ("-N2", *tasks, *shell, *TRAIN, *settings(tmp_path, "x"), *overrides)
    ended = slurm.srun(*words, timeout=LIMIT_S, cwd=tmp_path).succeeded()
    assert ended.stdout.count(f"layout {layout}\n") == world_size, str(ended)
    assert f"0: {RESULT}" in ended.stdout, str(ended)
    check_trained(ended.stdout, tmp_path / "x", world_size)


def test_a_batch_script_without_srun_is_a_world_of_one(slurm: SlurmCluster, tmp_path: Path) -> None:
    """SLURM_NTASKS is 4 there, and SLURM_PROCID 0; yet nobody has started three others to wait for."""
    script, log = tmp_path / "job.sh", tmp_path / "job.log"
    script.write_text(
        f"#!/bin/bash\nset -u\necho tasks=$SLURM_NTASKS rank=$SLURM_PROCID\n"
        f"exec {shlex.join([*TRAIN, *settings(tmp_path, 'x')])}\n"
    )
    job_id = slurm.sbatch("--ntasks=4", f"--output={log}", script, cwd=tmp_path)
    job = slurm.wait_for_job(job_id, timeout=LIMIT_S)
    printed = log.read_text()
    assert job["JobState"] == "COMPLETED", f"{job}\n{printed}"
    assert "tasks=4 rank=0\n" in printed
    check_trained(printed, tmp_path / "x", world_size=1)


def test_a_bad_key_is_one_line_for_all_ranks(slurm: SlurmCluster, tmp_path: Path) -> None:
    ended = slurm.srun("-N2", "-n4", *TRAIN, "train.epoch=2", timeout=LIMIT_S, cwd=tmp_path)
    assert ended.status == 2, str(ended)
    lines = [line for line in (ended.stdout + ended.stderr).splitlines() if "distlenet: " in line]
    assert len(lines) == 1, str(ended)
    assert lines[0].startswith("0: distlenet: train.epoch"), str(ended)
    assert "Traceback" not in ended.stderr, str(ended)


def test_two_jobs_on_the_same_nodes_do_not_meet(slurm: SlurmCluster, tmp_path: Path) -> None:
    # Each task waits until the other job runs, too: jobs one after the other could not meet.
    wait = 'touch "$1.runs"; until [ -e "$2.runs" ]; do sleep 0.1; done; shift 2; exec "$@"'

    def train(name: str, other: str) -> CommandResult:
        shell = ("bash", "-c", wait, "task", name, other)
        return slurm.srun("-N2", "-n2", *shell, *TRAIN, *settings(tmp_path, name), timeout=LIMIT_S, cwd=tmp_path)

    with ThreadPoolExecutor() as threads:
        jobs = {name: threads.submit(train, name, other) for name, other in ("ab", "ba")}
    for name, job in jobs.items():
        ended = job.result().succeeded()
        check_trained(ended.stdout, tmp_path / name, world_size=2)
        assert f"0: Files of this run: {tmp_path / name}\n" in ended.stdout, str(ended)
