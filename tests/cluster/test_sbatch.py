"""The project's own batch scripts on a real cluster: what ends a job, and what comes back by itself."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import REPO

from cluster.slurm_cluster import SlurmCluster
from distlenet.checkpoint.format import load_checkpoint
from distlenet.checkpoint.store import CheckpointStore

pytestmark = pytest.mark.cluster

LIMIT_S = 150.0  # of one job with its restarts; several times what it needs on two cores
TWO_BY_TWO = ("--nodes=2", "--cpus-per-task=2")
SETTINGS = (
    "data.name=digits",
    "device=cpu",
    "train.global_batch_size=64",
    "train.epochs=30",
    "train.log_every=5",
    "optim.lr=0.05",
)


@pytest.fixture(autouse=True)
def _no_job_left(slurm: SlurmCluster) -> Iterator[None]:
    yield
    slurm.cancel_all()


class Job:
    """One submitted job, and the run that it trains."""

    def __init__(self, slurm: SlurmCluster, folder: Path, name: str, *words: str, **env: str) -> None:
        """Submit ``slurm/train.sbatch``, or the script in ``words``, and options before it."""
        self.slurm, self.run, self.log = slurm, folder / name, folder / f"{name}.log"
        words = words if any(word.endswith(".sbatch") for word in words) else (*words, "slurm/train.sbatch")
        run = (f"run.dir={folder}", f"run.name={name}")
        environ = {"PYTHON": sys.executable, **env}
        self.id = slurm.sbatch(f"--output={self.log}", *words, *SETTINGS, *run, cwd=REPO, env=environ)

    def ends(self, *states: str) -> dict[str, str]:
        """Wait for the job's end, in the state COMPLETED or a given one; return its fields."""
        job = self.slurm.wait_for_job(self.id, timeout=LIMIT_S)
        assert job["JobState"] in (states or ("COMPLETED",)), f"{job}\n{self.printed()}"
        return job

    def trains(self, starts: int = 1) -> None:
        """Wait until the run's n-th start has told a first record."""
        path, history = self.run / "starts.jsonl", self.run / "metrics.jsonl"

        def told() -> bool:
            lines = path.read_text().splitlines() if path.exists() else []
            if len(lines) < starts or not history.exists():
                return False
            step = json.loads(lines[starts - 1])["step"]
            return any(json.loads(line)["step"] > step for line in history.read_text().splitlines())

        self.slurm.poll(told, f"start {starts} of {self.run}\n{self.printed()}", LIMIT_S)

    def printed(self) -> str:
        """Return what the job has printed so far."""
        return self.log.read_text() if self.log.exists() else "(no output)"

    def final(self) -> dict[str, torch.Tensor]:
        """Return the trained weights; the run must have ended by its own."""
        assert (self.run / "summary.json").exists(), self.printed()
        newest = CheckpointStore(self.run / "checkpoints", keep=1).newest()
        assert newest is not None
        return dict(load_checkpoint(newest)["model"])

    def signal(self) -> None:
        """Warn the batch shell, as SLURM does before the time limit."""
        self.slurm.run("ctl", "scancel", "--batch", "--signal=USR2", self.id).succeeded()


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a run of 2 × 2 ranks that nothing disturbed."""
    job = Job(slurm, tmp_path_factory.mktemp("whole"), "whole", *TWO_BY_TWO)
    job.ends()
    assert json.loads((job.run / "summary.json").read_text())["world_size"] == 4, job.printed()
    assert job.printed().count("Accuracy of the network on the 360 test images") == 1, job.printed()
    return job.final()


def test_a_warned_job_saves_requeues_and_ends_in_the_same_bytes(slurm, tmp_path, whole):
    job = Job(slurm, tmp_path, "warned", *TWO_BY_TWO)
    job.trains()
    job.signal()
    assert job.ends()["Restarts"] == "1", job.printed()
    printed = job.printed()
    assert printed.count("distlenet: stopped by SIGTERM after step") == 1, printed
    assert "requeueing, for the 1. time" in printed
    assert "resumed at step" in printed
    assert_same(job.final(), whole)


def test_a_cancelled_job_leaves_a_valid_checkpoint(slurm, tmp_path, whole):
    job = Job(slurm, tmp_path, "cancelled", *TWO_BY_TWO)
    job.trains()
    slurm.run("ctl", "scancel", job.id).succeeded()
    job.ends("CANCELLED")
    slurm.poll(lambda: "stopped by SIGTERM" in job.printed(), "the ranks to save", 30)
    found = CheckpointStore(job.run / "checkpoints", keep=1).load_newest()
    assert found is not None, job.printed()
    step = found[1]["step"]
    assert step > 0
    assert f"after step {step}, saved" in job.printed()
    again = Job(slurm, tmp_path, "cancelled", *TWO_BY_TWO)
    again.ends()
    assert f"resumed at step {step} of" in again.printed()
    assert_same(again.final(), whole)


def test_requeues_are_limited(slurm, tmp_path):
    job = Job(slurm, tmp_path, "limited", *TWO_BY_TWO, MAX_REQUEUES="1")
    job.trains()
    job.signal()
    job.trains(starts=2)
    job.signal()
    assert job.ends("FAILED")["Restarts"] == "1", job.printed()
    assert "not requeued: it was 1 times (MAX_REQUEUES=1)" in job.printed()


def test_a_node_that_loses_power_is_replaced(slurm, tmp_path, whole):
    job = Job(slurm, tmp_path, "power", *TWO_BY_TWO)
    job.trains()
    lost = slurm.hosts_of(job.id)[-1]
    slurm.power_off(lost)
    try:
        ended = job.ends()
        assert ended["Restarts"] == "1", job.printed()
        assert lost not in slurm.hosts_of(job.id)
        assert_same(job.final(), whole)
    finally:
        slurm.power_on(lost)


def test_two_jobs_on_the_same_nodes_do_not_meet(slurm, tmp_path, whole):
    jobs = [Job(slurm, tmp_path, name, *TWO_BY_TWO, "--nodelist=n1,n2") for name in ("a", "b")]
    for job in jobs:
        job.ends()
        assert json.loads((job.run / "summary.json").read_text())["world_size"] == 4
        assert_same(job.final(), whole)


def test_an_array_trains_a_run_per_task(slurm, tmp_path):
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("run.name=r0 optim.lr=0.02\nrun.name=r1 seed=5\nrun.name=r2 train.epochs=2\n")
    words = ("--array=0-2", "slurm/train_array.sbatch", "train.epochs=3")
    job = Job(slurm, tmp_path, "array", *words, SWEEP=str(sweep))
    slurm.poll(lambda: len(list(tmp_path.glob("r*/summary.json"))) == 3, f"3 runs\n{job.printed()}", LIMIT_S)
    config = [(tmp_path / f"r{task}/config.yaml").read_text() for task in range(3)]
    assert "lr: 0.02" in config[0]
    assert "seed: 5" in config[1]
    assert "epochs: 2" in config[2]
    states = {task["JobState"] for task in slurm.jobs() if task.get("ArrayJobId") == job.id}
    slurm.poll(
        lambda: {t["JobState"] for t in slurm.jobs() if t.get("ArrayJobId") == job.id} == {"COMPLETED"},
        f"all tasks completed, were {states}",
        LIMIT_S,
    )


def test_ranks_of_srun_itself_save_and_come_back_too(slurm, tmp_path, whole):
    job = Job(slurm, tmp_path, "direct", "--nodes=2", "--ntasks-per-node=2", "slurm/srun_direct.sbatch")
    job.trains()
    job.signal()
    assert job.ends()["Restarts"] == "1", job.printed()
    assert "requeueing" in job.printed()
    assert_same(job.final(), whole)


def test_a_mistake_ends_in_failed(slurm, tmp_path):
    job = Job(slurm, tmp_path, "mistake", "slurm/train.sbatch", "optim.lrr=3", MAX_RESTARTS="0")
    assert job.ends("FAILED")["ExitCode"] != "0:0"
    assert job.printed().count("did you mean optim.lr?") == 1, job.printed()


def test_gpus_that_slurm_gives_decide_the_ranks(slurm, tmp_path):
    """The node's GPUs are device files that lead nowhere; what SLURM says of them is real."""
    job = Job(slurm, tmp_path, "gpus", "--gpus-per-node=2", "--cpus-per-task=1", "slurm/train.sbatch", "train.epochs=1")
    job.ends()
    assert json.loads((job.run / "summary.json").read_text())["world_size"] == 2, job.printed()
