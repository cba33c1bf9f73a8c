"""The batch scripts on a real cluster: stopping, requeueing and lost nodes."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import REPO, read_lines

from cluster.slurm_cluster import SlurmCluster
from distlenet.checkpoint.format import load_checkpoint
from distlenet.checkpoint.store import CheckpointStore

pytestmark = pytest.mark.cluster

LIMIT_S = 300.0  # of one job with its restarts; several times its duration on two cores, which two clusters share
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


class SlurmJob:
    """A submitted job and the run that it trains."""

    def __init__(self, slurm: SlurmCluster, directory: Path, name: str, *options: str, **env: str) -> None:
        """Submit ``slurm/train.sbatch`` with ``options``, or the script that they contain."""
        self.slurm, self.run, self.log = slurm, directory / name, directory / f"{name}.log"
        if not any(option.endswith(".sbatch") for option in options):
            options = (*options, "slurm/train.sbatch")
        run = (f"run.dir={directory}", f"run.name={name}")
        environ = {"PYTHON": sys.executable, **env}
        self.id = slurm.sbatch(f"--output={self.log}", *options, *SETTINGS, *run, cwd=REPO, env=environ)

    def wait(self, *states: str) -> dict[str, str]:
        """Wait until the job has ended with the state COMPLETED, or one of ``states``; return its fields."""
        job = self.slurm.wait_for_job(self.id, timeout=LIMIT_S)
        assert job["JobState"] in (states or ("COMPLETED",)), f"{job}\n{self.output()}"
        return job

    def wait_for_training(self, starts: int = 1) -> None:
        """Wait until the run has logged a record after its n-th start."""
        path, history = self.run / "starts.jsonl", self.run / "metrics.jsonl"

        def has_record() -> bool:
            records = read_lines(path)
            if len(records) < starts:
                return False
            step = records[starts - 1]["step"]
            return any(record["step"] > step for record in read_lines(history))

        self.slurm.poll(has_record, f"start {starts} of {self.run}\n{self.output()}", LIMIT_S)

    def output(self) -> str:
        """Return the output of the job so far."""
        return self.log.read_text() if self.log.exists() else "(no output)"

    def final_weights(self) -> dict[str, torch.Tensor]:
        """Return the trained weights of a completed run."""
        assert (self.run / "summary.json").exists(), self.output()
        newest = CheckpointStore(self.run / "checkpoints", keep_last=1).newest()
        assert newest is not None
        return dict(load_checkpoint(newest)["model"])

    def signal(self) -> None:
        """Signal the batch shell, as SLURM does before the time limit."""
        self.slurm.run("ctl", "scancel", "--batch", "--signal=USR2", self.id).succeeded()


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def undisturbed(slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Return the weights of an undisturbed run on 2 × 2 ranks."""
    job = SlurmJob(slurm, tmp_path_factory.mktemp("undisturbed"), "undisturbed", *TWO_BY_TWO)
    job.wait()
    assert json.loads((job.run / "summary.json").read_text())["world_size"] == 4, job.output()
    assert job.output().count("Accuracy of the network on the 360 test images") == 1, job.output()
    return job.final_weights()


def test_a_signalled_job_saves_requeues_and_ends_with_the_same_bits(slurm, tmp_path, undisturbed):
    job = SlurmJob(slurm, tmp_path, "signalled", *TWO_BY_TWO)
    job.wait_for_training()
    job.signal()
    assert job.wait()["Restarts"] == "1", job.output()
    output = job.output()
    assert output.count("distlenet: stopped by SIGTERM after step") == 1, output
    assert "requeueing (1 of at most 10)" in output
    assert "resumed at step" in output
    assert_same(job.final_weights(), undisturbed)


def test_a_cancelled_job_leaves_a_valid_checkpoint(slurm, tmp_path, undisturbed):
    job = SlurmJob(slurm, tmp_path, "cancelled", *TWO_BY_TWO)
    job.wait_for_training()
    slurm.run("ctl", "scancel", job.id).succeeded()
    job.wait("CANCELLED")
    slurm.poll(lambda: "stopped by SIGTERM" in job.output(), "the ranks to save", 30)
    found = CheckpointStore(job.run / "checkpoints", keep_last=1).load_newest()
    assert found is not None, job.output()
    step = found[1]["step"]
    assert step > 0
    assert f"after step {step}, saved" in job.output()
    again = SlurmJob(slurm, tmp_path, "cancelled", *TWO_BY_TWO)
    again.wait()
    assert f"resumed at step {step} of" in again.output()
    assert_same(again.final_weights(), undisturbed)


def test_requeues_are_limited(slurm, tmp_path):
    job = SlurmJob(slurm, tmp_path, "limited", *TWO_BY_TWO, MAX_REQUEUES="1")
    job.wait_for_training()
    job.signal()
    job.wait_for_training(starts=2)
    job.signal()
    assert job.wait("FAILED")["Restarts"] == "1", job.output()
    assert "not requeued after 1 requeues (MAX_REQUEUES=1)" in job.output()


def test_a_node_that_loses_power_is_replaced(slurm, tmp_path, undisturbed):
    job = SlurmJob(slurm, tmp_path, "power", *TWO_BY_TWO)
    job.wait_for_training()
    lost = slurm.hosts_of(job.id)[-1]
    slurm.power_off(lost)
    try:
        ended = job.wait()
        assert ended["Restarts"] == "1", job.output()
        assert lost not in slurm.hosts_of(job.id)
        assert_same(job.final_weights(), undisturbed)
    finally:
        slurm.power_on(lost)


def test_two_jobs_on_the_same_nodes_do_not_interfere(slurm, tmp_path, undisturbed):
    jobs = [SlurmJob(slurm, tmp_path, name, *TWO_BY_TWO, "--nodelist=n1,n2") for name in ("a", "b")]
    for job in jobs:
        job.wait()
        assert json.loads((job.run / "summary.json").read_text())["world_size"] == 4
        assert_same(job.final_weights(), undisturbed)


def test_an_array_trains_a_run_per_task(slurm, tmp_path):
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("run.name=r0 optim.lr=0.02\nrun.name=r1 seed=5\nrun.name=r2 train.epochs=2\n")
    options = ("--array=0-2", "slurm/train_array.sbatch", "train.epochs=3")
    job = SlurmJob(slurm, tmp_path, "array", *options, SWEEP=str(sweep))
    slurm.poll(lambda: len(list(tmp_path.glob("r*/summary.json"))) == 3, f"3 runs\n{job.output()}", LIMIT_S)
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


def test_srun_direct_saves_and_requeues(slurm, tmp_path, undisturbed):
    job = SlurmJob(slurm, tmp_path, "direct", "--nodes=2", "--ntasks-per-node=2", "slurm/srun_direct.sbatch")
    job.wait_for_training()
    job.signal()
    assert job.wait()["Restarts"] == "1", job.output()
    assert "requeueing" in job.output()
    assert_same(job.final_weights(), undisturbed)


def test_an_unknown_setting_fails_the_job(slurm, tmp_path):
    job = SlurmJob(slurm, tmp_path, "mistake", "slurm/train.sbatch", "optim.lrr=3", MAX_RESTARTS="0")
    assert job.wait("FAILED")["ExitCode"] != "0:0"
    assert job.output().count("did you mean optim.lr?") == 1, job.output()


def test_one_rank_per_gpu_of_the_job(slurm, tmp_path):
    """The GPUs are device files without devices, but SLURM's variables are real."""
    job = SlurmJob(
        slurm, tmp_path, "gpus", "--gpus-per-node=2", "--cpus-per-task=1", "slurm/train.sbatch", "train.epochs=1"
    )
    job.wait()
    assert json.loads((job.run / "summary.json").read_text())["world_size"] == 2, job.output()
