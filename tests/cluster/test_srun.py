"""Ranks started by srun without torchrun, on two nodes of a real cluster."""

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

LIMIT_S = 200.0  # of one command; several times its duration on two cores, which two clusters share
TRAIN = (sys.executable, "-m", "distlenet.train")
RESULT = "Accuracy of the network on the 360 test images"


@pytest.fixture(autouse=True)
def _no_job_left(slurm: SlurmCluster) -> Iterator[None]:
    yield
    slurm.cancel_all()


def settings(run_dir: Path, name: str) -> list[str]:
    run = [f"run.dir={run_dir}", f"run.name={name}"]
    return ["data.name=digits", "device=cpu", "train.epochs=2", "train.global_batch_size=64", "train.log_every=1", *run]


def check_trained(output: str, run_dir: Path, world_size: int) -> None:
    """Check that one job of ``world_size`` ranks completed, and that only rank 0 printed."""
    assert [RESULT in line for line in output.splitlines()].count(True) == 1, output
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    assert summary["world_size"] == world_size, output
    assert summary["backend"] == "gloo", output
    assert summary["test_count"] == 360, output
    assert not set("\x1b\r") & set(output), output  # no colours, no progress bar
    records = len((run_dir / "metrics.jsonl").read_text().splitlines())
    assert records >= 46
    assert output.count("  step ") <= records / 2, output  # one every 5 s, not one per record


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
    # The shell prints the layout that SLURM chose.
    shell = ("bash", "-c", 'echo "layout $SLURM_STEP_TASKS_PER_NODE"; exec "$@"', "task")
    command = ("-N2", *tasks, *shell, *TRAIN, *settings(tmp_path, "x"), *overrides)
    result = slurm.srun(*command, timeout=LIMIT_S, cwd=tmp_path).succeeded()
    assert result.stdout.count(f"layout {layout}\n") == world_size, str(result)
    assert f"0: {RESULT}" in result.stdout, str(result)
    check_trained(result.stdout, tmp_path / "x", world_size)


def test_a_batch_script_without_srun_is_one_process(slurm: SlurmCluster, tmp_path: Path) -> None:
    """SLURM_NTASKS is 4 and SLURM_PROCID 0, but the other three tasks are not started."""
    script, log = tmp_path / "job.sh", tmp_path / "job.log"
    script.write_text(
        f"#!/bin/bash\nset -u\necho tasks=$SLURM_NTASKS rank=$SLURM_PROCID\n"
        f"exec {shlex.join([*TRAIN, *settings(tmp_path, 'x')])}\n"
    )
    job_id = slurm.sbatch("--ntasks=4", f"--output={log}", script, cwd=tmp_path)
    job = slurm.wait_for_job(job_id, timeout=LIMIT_S)
    output = log.read_text()
    assert job["JobState"] == "COMPLETED", f"{job}\n{output}"
    assert "tasks=4 rank=0\n" in output
    check_trained(output, tmp_path / "x", world_size=1)


def test_an_unknown_setting_is_one_line_for_all_ranks(slurm: SlurmCluster, tmp_path: Path) -> None:
    result = slurm.srun("-N2", "-n4", *TRAIN, "train.epoch=2", timeout=LIMIT_S, cwd=tmp_path)
    assert result.status == 2, str(result)
    lines = [line for line in (result.stdout + result.stderr).splitlines() if "distlenet: " in line]
    assert len(lines) == 1, str(result)
    assert lines[0].startswith("0: distlenet: train.epoch"), str(result)
    assert "Traceback" not in result.stderr, str(result)


def test_two_jobs_on_the_same_nodes_do_not_interfere(slurm: SlurmCluster, tmp_path: Path) -> None:
    # Each task waits until the other job runs, so that both run at the same time.
    wait_for_other = 'touch "$1.runs"; until [ -e "$2.runs" ]; do sleep 0.1; done; shift 2; exec "$@"'

    def train(name: str, other: str) -> CommandResult:
        shell = ("bash", "-c", wait_for_other, "task", name, other)
        return slurm.srun("-N2", "-n2", *shell, *TRAIN, *settings(tmp_path, name), timeout=LIMIT_S, cwd=tmp_path)

    with ThreadPoolExecutor() as threads:
        jobs = {name: threads.submit(train, name, other) for name, other in ("ab", "ba")}
    for name, job in jobs.items():
        result = job.result().succeeded()
        check_trained(result.stdout, tmp_path / name, world_size=2)
        assert f"0: Files of this run: {tmp_path / name}\n" in result.stdout, str(result)
