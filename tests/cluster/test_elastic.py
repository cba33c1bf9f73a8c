"""An elastic job with launch/node.sh: machines leave and join while it runs."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO, Job, read_lines, run_command

from cluster.held_task import HELD_EPOCHS
from cluster.slurm_cluster import SlurmCluster
from distlenet.checkpoint.format import load_checkpoint
from distlenet.checkpoint.store import CheckpointStore

pytestmark = pytest.mark.cluster

SETTINGS = (
    "device=cpu",
    "data.name=digits",
    "data.ledger=true",
    "distributed.reduction=exact",
    "train.global_batch_size=64",
    "train.epochs=20",
    "train.log_every=5",
    "optim.lr=0.05",
    "checkpoint.every_steps=3",
    "task.name=cluster.held_task:Held",
    "run.name=run",
)


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = CheckpointStore(run / "checkpoints", keep_last=1).newest()
    assert newest is not None
    return dict(load_checkpoint(newest)["model"])


@pytest.mark.parametrize("head", ["10.77.0.2"])
def test_machines_that_leave_and_join(slurm: SlurmCluster, tmp_path: Path, head: str) -> None:
    """The head is given by its address, by which torchrun alone does not recognise it.

    The run waits before some epochs: it cannot end before a machine has left and joined.
    """
    command = (REPO / "launch/node.sh", "--nodes", "1:2", "--head", head, "--interface", "eth0", "-n", "1", *SETTINGS)

    held = {"HELD_DIRECTORY": str(tmp_path), "PYTHONPATH": f"{REPO}:{REPO / 'tests'}"}
    run = tmp_path / "run"

    def start(node: str) -> Job:
        environ = ("env", f"PYTHON={sys.executable}", *(f"{name}={value}" for name, value in held.items()))
        return Job(tmp_path, *slurm.hosts[node].enter(*environ, *command, f"run.dir={tmp_path}", cwd=REPO))

    def last_start() -> dict:
        return (read_lines(run / "starts.jsonl") or [{"world_size": 0}])[-1]

    def has_record() -> bool:
        """Return whether the last start has logged a record."""
        return any(record["step"] > last_start()["step"] for record in read_lines(run / "metrics.jsonl"))

    def release(epoch: int) -> None:
        (tmp_path / f"released-{epoch}").touch()

    with start("n1") as first:
        with start("n2") as second:
            first.wait_until(lambda: last_start()["world_size"] == 2, "two ranks")
            release(HELD_EPOCHS[0])
            first.wait_until(has_record, "a record")
            second.kill()  # agent and ranks
        release(HELD_EPOCHS[1])
        first.wait_until(lambda: last_start()["world_size"] == 1, "one rank")
        first.wait_until(has_record, "a record of one rank")
        with start("n2") as second:
            try:
                first.wait_until(lambda: last_start()["world_size"] == 2, "two ranks again")
            except AssertionError as error:
                raise AssertionError(f"{error}\n--- n2\n{second.output()}") from error
            release(HELD_EPOCHS[2])
            result = first.wait()
            second.wait()
    assert result.status == 0, str(result)
    run_command(sys.executable, "-m", "distlenet.ledger", run).succeeded()
    alone = tmp_path / "alone"
    settings = (*SETTINGS, "data.ledger=false", "checkpoint.every_steps=null", f"run.dir={alone}")
    run_command(sys.executable, "-m", "distlenet.train", *settings, env=held).succeeded()
    a, b = weights(run), weights(alone / "run")
    assert all(torch.equal(a[name], b[name]) for name in a | b)
