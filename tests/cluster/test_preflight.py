"""Preflight on several hosts, each fault made and found."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
from conftest import CommandResult

from cluster.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.cluster

LIMIT_S = 100.0
LYING = Path(__file__).parents[1] / "ranks/lying_preflight.py"
SETTINGS = ("data.name=digits", "device=cpu", "distributed.init_timeout_s=30")
PREFLIGHT = (sys.executable, "-m", "distlenet.preflight", *SETTINGS)


@pytest.fixture(autouse=True)
def _no_job_left(slurm: SlurmCluster) -> Iterator[None]:
    yield
    slurm.cancel_all()


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


@contextmanager
def mounted(slurm: SlurmCluster, host: str, *mount: object) -> Iterator[None]:
    """Have a mount on one host alone; its last word is where."""
    slurm.run(host, "mount", *mount).succeeded()
    try:
        yield
    finally:
        slurm.run(host, "umount", "--lazy", mount[-1]).succeeded()


def look(
    slurm: SlurmCluster, *words: object, nodes: int = 2, each: int = 1, env: dict[str, str] | None = None
) -> CommandResult:
    """Run preflight on ``each`` ranks of some nodes."""
    tasks = (f"-N{nodes}", f"-n{each * nodes}", f"--ntasks-per-node={each}")
    return slurm.srun(*tasks, *words, timeout=LIMIT_S, env=env)


def failed(ended: CommandResult) -> list[str]:
    """Return the failed lines of the one table that was printed, without the number of its task."""
    assert ended.status == 2, str(ended)
    assert ended.stdout.count("a job would not start") == 1, str(ended)
    lines = [line.partition(": ")[2] for line in ended.stdout.splitlines()]
    return [line for line in lines if line.startswith("FAIL")]


def test_three_hosts_are_well(slurm: SlurmCluster, shared: Path) -> None:
    words = ("train.global_batch_size=126", f"run.dir={shared}", "--allreduce", "--json")
    ended = look(slurm, *PREFLIGHT, *words, nodes=3).succeeded()
    # srun cuts long lines, and labels each part.
    report = json.loads("".join(line.partition(": ")[2] for line in ended.stdout.splitlines()))
    assert report["good"]
    found = {check["name"]: check["found"] for check in report["checks"]}
    assert found["ports"] == "open between 3 nodes"
    assert found["names"].startswith("n1 eth0 10.77.0.2, n2 eth0")
    assert "writable on 3 nodes" in found["run folder"]
    slow = found["pairs of nodes"] != "none takes twice the median"
    assert bool(report["slow_pairs"]) == slow
    assert report["all_reduce"]["ranks"] == 3
    assert list(shared.parent.iterdir()) == [shared]
    assert not list(shared.iterdir())


def test_the_batch_script(slurm: SlurmCluster, shared: Path) -> None:
    repository = Path(__file__).parents[2]
    log = shared.parent / "job.log"
    words = ("--nodes=2", f"--output={log}", "slurm/preflight.sbatch", *SETTINGS, f"run.dir={shared}")
    job = slurm.wait_for_job(slurm.sbatch(*words, env={"PYTHON": sys.executable}, cwd=repository), timeout=LIMIT_S)
    assert job["JobState"] == "COMPLETED", log.read_text()
    assert "4 ranks looked at in " in log.read_text()
    assert "a job would start" in log.read_text()


@pytest.mark.parametrize(
    ("lie", "line"),
    [
        ("torch", "FAIL  versions        torch 2."),
        ("clock", "FAIL  clocks          n2 is 300."),
    ],
)
def test_a_node_that_differs(slurm: SlurmCluster, shared: Path, lie: str, line: str) -> None:
    (told,) = failed(look(slurm, sys.executable, LYING, lie, *SETTINGS, f"run.dir={shared}"))
    assert told.startswith(line)


def test_a_pair_of_nodes_that_is_slow(slurm: SlurmCluster, shared: Path) -> None:
    words = ("train.global_batch_size=126", f"run.dir={shared}", "--allreduce", "--json")
    ended = look(slurm, sys.executable, LYING, "pair", *SETTINGS, *words, nodes=3).succeeded()
    report = json.loads("".join(line.partition(": ")[2] for line in ended.stdout.splitlines()))
    ((one, other, times),) = report["slow_pairs"]
    assert (one, other) == ("n1", "n2")
    assert times > 20  # 0.2 s there and back, beside milliseconds
    (found,) = [check for check in report["checks"] if check["name"] == "pairs of nodes"]
    assert found["status"] == "note"
    assert found["found"] == f"slower than the median: n1 – n2 {times:.1f}×"


def test_two_ranks_on_one_device(slurm: SlurmCluster, shared: Path) -> None:
    (told,) = failed(look(slurm, sys.executable, LYING, "gpu", *SETTINGS, f"run.dir={shared}", each=2))
    assert told.startswith("FAIL  devices         ranks 0, 1 share one GPU, n1 GPU-8d2f; let each rank see all GPUs")


def test_ports_closed_between_two_nodes(slurm: SlurmCluster, shared: Path) -> None:
    """n2 and n3 reach n1, but not each other."""
    route = ("route", "add", "unreachable", "10.77.0.4/32")
    slurm.run("n2", "ip", *route).succeeded()
    try:
        (told,) = failed(look(slurm, *PREFLIGHT, f"run.dir={shared}", nodes=3))
    finally:
        slurm.run("n2", "ip", "route", "delete", *route[2:]).succeeded()
    assert "FAIL  ports           n2 cannot reach n3 (10.77.0.4 port " in told
    assert "n3 cannot reach n2" in told
    assert "n1" not in told


def test_a_port_where_nobody_is(slurm: SlurmCluster, shared: Path) -> None:
    """The ranks are told to meet at n3, where rank 0 is not."""
    env = {"MASTER_ADDR": "n3", "MASTER_PORT": "20001"}
    ended = look(slurm, "--nodelist=n1,n2", *PREFLIGHT, f"run.dir={shared}", "--wait", "5", env=env)
    assert ended.status == 2, str(ended)
    assert "FAIL  ranks" in ended.stdout
    assert "rank 1 of 2 on n2 cannot reach rank 0 at n3:20001: Connection refused" in ended.stdout, str(ended)


def test_a_port_that_is_taken(slurm: SlurmCluster, shared: Path) -> None:
    sits = "import socket, sys; s = socket.create_server(('', 20002)); print('sits', flush=True); sys.stdin.read()"
    command = slurm.hosts["n1"].enter(sys.executable, "-c", sits, cwd=shared)
    with Popen(command, stdin=PIPE, stdout=PIPE, text=True) as sitting:  # until its standard input ends
        assert sitting.stdout is not None
        assert sitting.stdout.readline() == "sits\n"
        ended = look(slurm, *PREFLIGHT, f"run.dir={shared}", "--wait", "5", env={"MASTER_PORT": "20002"})
    assert ended.status == 2, str(ended)
    assert "port 20002 on n1 is in use, by another job" in ended.stdout, str(ended)
    assert "what listens at n1:20002 is not rank 0" in ended.stdout, str(ended)


def test_a_host_that_cannot_be_resolved(slurm: SlurmCluster, shared: Path) -> None:
    ended = look(slurm, *PREFLIGHT, f"run.dir={shared}", "--wait", "5", env={"MASTER_ADDR": "nosuchhost"})
    assert ended.status == 2, str(ended)
    assert "the name nosuchhost, where the ranks meet, cannot be resolved" in ended.stdout


def test_a_name_that_means_loopback(slurm: SlurmCluster, shared: Path) -> None:
    """As Debian's installer writes it."""
    hosts = shared.parent / "hosts"
    hosts.write_text("127.0.0.1 localhost\n127.0.1.1 n2\n10.77.0.1 ctl\n10.77.0.2 n1\n10.77.0.3 n2\n10.77.0.4 n3\n")
    with mounted(slurm, "n2", "--bind", hosts, "/etc/hosts"):
        (told,) = failed(look(slurm, *PREFLIGHT, f"run.dir={shared}"))
        pinned = look(slurm, *PREFLIGHT, f"run.dir={shared}", env={"GLOO_SOCKET_IFNAME": "eth0"})
    assert told.startswith(
        "FAIL  names           n2 resolves to 127.0.1.1, which no other node can reach; set GLOO_SOCKET_IFNAME=eth0"
    )
    pinned.succeeded()


def test_a_run_folder_that_is_not_shared(slurm: SlurmCluster, shared: Path) -> None:
    with mounted(slurm, "n2", "-t", "tmpfs", "tmpfs", shared):
        (told,) = failed(look(slurm, *PREFLIGHT, f"run.dir={shared}"))
    assert told.startswith(f"FAIL  run folder      {shared} on n2 is not the folder of n1")


def test_a_full_disk(slurm: SlurmCluster, shared: Path) -> None:
    with (
        mounted(slurm, "n1", "-t", "tmpfs", "-o", "size=1m", "tmpfs", shared),
    ):
        (told,) = failed(slurm.srun("-N1", "-n2", "--nodelist=n1", *PREFLIGHT, f"run.dir={shared}", timeout=LIMIT_S))
    assert told.startswith(f"FAIL  room            {shared} has 1.0 MB free, 5 checkpoints take 3.3 MB; make room")


def test_data_that_one_node_lacks(slurm: SlurmCluster, shared: Path, fashion_mnist: dict[str, Path]) -> None:
    (root,) = {path.parent for path in fashion_mnist.values()}
    words = (*PREFLIGHT, "data.name=fashion_mnist", f"data.root={root}", f"run.dir={shared}")
    look(slurm, *words).succeeded()
    debian = Path("/usr/share/dataset-fashion-mnist")
    with mounted(slurm, "n2", "-t", "tmpfs", "tmpfs", root):
        if debian.exists():
            slurm.run("n2", "mount", "-t", "tmpfs", "tmpfs", debian).succeeded()
        try:
            (told,) = failed(look(slurm, *words))
        finally:
            if debian.exists():
                slurm.run("n2", "umount", debian).succeeded()
    assert told.startswith(f"FAIL  data            n2: data.name=fashion_mnist: is not in data.root={root};")
