"""A run in an object store, on two machines that share no directory, while ranks, agents and machines are killed.

``make chaos-store KILLS=20`` kills more often.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO, Job, run_torchrun, signal_all

from cluster.slurm_cluster import SlurmCluster
from distlenet.checkpoint.format import is_intact, load_checkpoint
from distlenet.checkpoint.store import CheckpointStore
from distlenet.tracking.base import NONDETERMINISTIC_KEYS

pytestmark = pytest.mark.cluster

KILLS = int(os.environ.get("STORE_KILLS", "2"))
EPOCHS_PER_KILL = 6  # 23 steps each: some are left when the last kill is sent
LIMIT_S = 150.0  # for progress after a kill; the lock of a machine that is lost expires after 45 s
ADDRESS, PORT = "10.77.0.1", 5000
HEAD, NODES = "10.77.0.2", ("n1", "n2")
SETTINGS = (
    "device=cpu",
    "distributed.reduction=exact",
    "data.name=digits",
    "data.augment=shift",
    "train.global_batch_size=64",
    f"train.epochs={max(10, EPOCHS_PER_KILL * KILLS)}",
    "train.log_every=23",
    "optim.lr=0.05",
    "checkpoint.every_steps=10",
    "checkpoint.max_restarts_without_progress=1000000",
    "run.name=run",
)
RUN_DIR = "s3://runs/chaos"


class Store:
    """The objects of the run, as another machine sees them, through a client on the controller."""

    def __init__(self, slurm: SlurmCluster, environment: dict[str, str], directory: Path) -> None:
        self.directory = directory
        variables = (f"{name}={value}" for name, value in environment.items())
        command = ("env", *variables, sys.executable, REPO / "tests/cluster/store_client.py")
        self.client = subprocess.Popen(
            slurm.hosts["ctl"].enter(*command, cwd=REPO), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.client.kill()
        self.client.wait()

    def request(self, *words: str) -> Any:
        assert self.client.stdin is not None
        assert self.client.stdout is not None
        print(json.dumps(words), file=self.client.stdin, flush=True)
        return json.loads(self.client.stdout.readline())

    def get(self, name: str) -> Path | None:
        """Download an object; return None if there is none."""
        path = self.directory / "downloaded" / Path(name).name
        path.parent.mkdir(exist_ok=True)
        return path if self.request("get", f"{RUN_DIR}/run/{name}", str(path)) else None

    def steps(self) -> list[int]:
        names = self.request("glob", f"{RUN_DIR}/run/checkpoints/step-*.pt")
        return [int(Path(name).stem.removeprefix("step-")) for name in names]

    def newest_step(self) -> int:
        return max(self.steps(), default=0)

    def check(self) -> None:
        """Check that the newest checkpoint is complete, and that no record before it is missing."""
        path = self.get(f"checkpoints/step-{self.newest_step():08d}.pt")
        if path is not None:  # else a newer one has replaced it
            assert is_intact(path), path
            steps = [record["step"] for record in self.history() if record["split"] == "train"]
            assert steps == list(range(23, 23 * len(steps) + 1, 23))
            assert load_checkpoint(path)["step"] < 23 * (len(steps) + 1)

    def history(self) -> list[dict]:
        path = self.get("metrics.jsonl")
        return without_times(path) if path is not None else []


def without_times(path: Path) -> list[dict]:
    records = map(json.loads, path.read_text().splitlines())
    return [{k: v for k, v in record.items() if k not in NONDETERMINISTIC_KEYS} for record in records]


class Machines:
    """The job on all nodes. A node's directory is lost with the machine."""

    def __init__(self, slurm: SlurmCluster, directory: Path, environment: dict[str, str]) -> None:
        self.slurm, self.directory, self.environment = slurm, directory, environment
        self.jobs: dict[str, Job] = {}

    def start_missing(self) -> None:
        """Start the job where it does not run. If an agent has given up, start all, as a scheduler does.

        Also if another has ended with success: the run was complete before its machine was lost.
        """
        statuses = [job.process.poll() for job in self.jobs.values()]
        if any(status not in (None, 0) for status in statuses) or (0 in statuses and len(statuses) < len(NODES)):
            self.kill(*self.jobs)
        for node in NODES:
            if node not in self.jobs:
                local = self.directory / node
                local.mkdir(exist_ok=True)
                variables = {**self.environment, "PYTHON": sys.executable, "WANDB_MODE": "disabled"}
                command = (REPO / "launch/node.sh", "--nodes", "2:2", "--head", HEAD, "--interface", "eth0", "-n", "1")
                self.jobs[node] = Job(
                    self.directory,
                    *self.slurm.hosts[node].enter(
                        *("env", *(f"{name}={value}" for name, value in variables.items())),
                        *(*command, "-r", "1000000", *SETTINGS, f"run.dir={RUN_DIR}", f"run.local_dir={local}"),
                        cwd=REPO,
                    ),
                )

    def done(self) -> bool:
        """Return whether all nodes have ended with success."""
        return len(self.jobs) == len(NODES) and all(job.process.poll() == 0 for job in self.jobs.values())

    def kill(self, *nodes: str) -> None:
        for node in list(nodes):
            self.jobs.pop(node).kill()

    def kill_rank(self, node: str) -> None:
        agent = self.jobs[node].process.pid
        ranks = [pid for child in children(agent) for pid in (children(child) or [child])]
        signal_all(ranks[-1:], signal.SIGKILL)

    def output(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self.directory.glob("out-*.txt"))


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def test_killed_machines_without_a_shared_disk(slurm: SlurmCluster, tmp_path: Path) -> None:
    server = slurm.hosts["ctl"].enter(sys.executable, REPO / "tests/s3_server.py", ADDRESS, PORT, cwd=REPO)
    with Job(tmp_path, *server) as s3:
        s3.wait_until(lambda: "run.dir" in s3.output(), "the server")
        lines = [line for line in s3.output().splitlines() if line.startswith("export ")]
        environment = dict(line.removeprefix("export ").split("=", 1) for line in lines)
        with Store(slurm, environment, tmp_path) as store:
            train_with_kills(store, Machines(slurm, tmp_path, environment), tmp_path)


def train_with_kills(store: Store, machines: Machines, directory: Path) -> None:
    random_, sent = random.Random(0), {}
    try:
        for number in range(KILLS):
            machines.start_missing()
            wait_for_progress(store, machines)
            store.check()
            time.sleep(random_.uniform(0.0, 1.0))  # not for synchronisation: the time of the kill
            node, what = random_.choice(NODES), ("machine", "rank", "agent")[number % 3]
            sent[what] = sent.get(what, 0) + 1
            if what == "rank":
                machines.kill_rank(node)
                continue
            machines.kill(node)
            if what == "machine":
                shutil.rmtree(directory / node)
        while not machines.done():
            wait_for_progress(store, machines)
    finally:
        machines.kill(*machines.jobs)
    print(f"kills: {sent}")
    run_torchrun(2, "-m", "distlenet.train", *SETTINGS, f"run.dir={directory}", timeout=240 + 20 * KILLS).succeeded()
    newest = CheckpointStore(directory / "run/checkpoints", keep_last=1).newest()
    assert newest is not None
    stored = store.get(f"checkpoints/{newest.name}")
    assert stored is not None
    a, b = (load_checkpoint(path)["model"] for path in (newest, stored))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert store.history() == without_times(directory / "run/metrics.jsonl")
    summaries = [
        json.loads(path.read_text()) for path in (store.get("summary.json"), directory / "run/summary.json") if path
    ]
    assert len({summary["test_loss"] for summary in summaries}) == 1
    assert len(summaries) == 2


def wait_for_progress(store: Store, machines: Machines) -> None:
    """Wait until a newer checkpoint is in the store, or the job is done."""
    step, deadline = store.newest_step(), time.monotonic() + LIMIT_S
    while store.newest_step() <= step and not machines.done():
        machines.start_missing()
        assert time.monotonic() < deadline, f"no progress after step {step}\n{machines.output()}"
        time.sleep(0.2)
