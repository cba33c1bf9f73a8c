"""An elastic job with launch/node.sh: machines leave and join while it runs."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO, Job, run_command

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
    "train.epochs=40",
    "train.log_every=5",
    "optim.lr=0.05",
    "checkpoint.every_steps=3",
    "run.name=run",
)


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = CheckpointStore(run / "checkpoints", keep_last=1).newest()
    assert newest is not None
    return dict(load_checkpoint(newest)["model"])


@pytest.mark.parametrize("head", ["10.77.0.2"])
def test_machines_that_leave_and_join(slurm: SlurmCluster, tmp_path: Path, head: str) -> None:
    """The head is given by its address, by which torchrun alone does not recognise it."""
    command = (REPO / "launch/node.sh", "--nodes", "1:2", "--head", head, "--interface", "eth0", "-n", "1", *SETTINGS)

    def start(node: str) -> Job:
        environ = ("env", f"PYTHON={sys.executable}")
        return Job(tmp_path, *slurm.hosts[node].enter(*environ, *command, f"run.dir={tmp_path}", cwd=REPO))

    def world_size() -> int:
        path = tmp_path / "run/starts.jsonl"
        starts = [json.loads(text)["world_size"] for text in path.read_text().splitlines()] if path.exists() else [0]
        return int(starts[-1])

    with start("n1") as first:
        with start("n2") as second:
            first.wait_until(lambda: world_size() == 2, "two ranks")
            first.wait_for_records()
            second.kill()  # agent and ranks
        first.wait_until(lambda: world_size() == 1, "one rank")
        first.wait_for_records()
        with start("n2") as second:
            try:
                first.wait_until(lambda: world_size() == 2, "two ranks again")
            except AssertionError as error:
                raise AssertionError(f"{error}\n--- n2\n{second.output()}") from error
            result = first.wait()
            second.wait()
    assert result.status == 0, str(result)
    run_command(sys.executable, "-m", "distlenet.ledger", tmp_path / "run").succeeded()
    alone = tmp_path / "alone"
    settings = (*SETTINGS, "data.ledger=false", "checkpoint.every_steps=null", f"run.dir={alone}")
    run_command(sys.executable, "-m", "distlenet.train", *settings).succeeded()
    a, b = weights(tmp_path / "run"), weights(alone / "run")
    assert all(torch.equal(a[name], b[name]) for name in a | b)
