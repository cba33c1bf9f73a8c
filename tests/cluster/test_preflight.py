"""Preflight on several hosts: each fault is created and reported."""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
from conftest import CommandResult

from cluster.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.cluster

LIMIT_S = 280.0
FAULTY = Path(__file__).parents[1] / "ranks/faulty_preflight.py"
SETTINGS = ("data.name=digits", "device=cpu", "distributed.init_timeout_s=200", "--wait", "200")
PREFLIGHT = (sys.executable, "-m", "distlenet.preflight", *SETTINGS)


@pytest.fixture(autouse=True)
def _no_job_left(slurm: SlurmCluster) -> Iterator[None]:
    yield
    slurm.cancel_all()


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """Return a run directory that all hosts share."""
    run_dir = tmp_path / "runs"
    run_dir.mkdir()
    return run_dir


@contextmanager
def mounted(slurm: SlurmCluster, host: str, *mount: object) -> Iterator[None]:
    """Mount on one host only; the last argument is the mount point."""
    slurm.run(host, "mount", *mount).succeeded()
    try:
        yield
    finally:
        slurm.run(host, "umount", "--lazy", mount[-1]).succeeded()


def run_preflight(
    slurm: SlurmCluster, *command: object, nodes: int = 2, per_node: int = 1, env: dict[str, str] | None = None
) -> CommandResult:
    """Run preflight with ``per_node`` ranks on each of some nodes."""
    tasks = (f"-N{nodes}", f"-n{per_node * nodes}", f"--ntasks-per-node={per_node}")
    return slurm.srun(*tasks, *command, timeout=LIMIT_S, env=env)


def failed(result: CommandResult) -> list[str]:
    """Return the FAIL lines of the only table that was printed, without the task number."""
    assert result.status == 2, str(result)
    assert result.stdout.count("a job would not start") == 1, str(result)
    lines = [line.partition(": ")[2] for line in result.stdout.splitlines()]
    return [line for line in lines if line.startswith("FAIL")]


def test_three_healthy_hosts(slurm: SlurmCluster, shared: Path) -> None:
    arguments = ("train.global_batch_size=126", f"run.dir={shared}", "--allreduce", "--json")
    result = run_preflight(slurm, *PREFLIGHT, *arguments, nodes=3).succeeded()
    # srun splits long lines, and labels each part.
    report = json.loads("".join(line.partition(": ")[2] for line in result.stdout.splitlines()))
    assert report["good"]
    found = {check["name"]: check["found"] for check in report["checks"]}
    assert found["ports"] == "open between 3 nodes"
    assert found["names"].startswith("n1 eth0 10.77.0.2, n2 eth0")
    assert "writable on 3 nodes" in found["run directory"]
    assert report["slow_pairs"] is not None  # all pairs are timed; on a busy machine, one may be slow
    assert report["all_reduce"]["ranks"] == 3
    assert list(shared.parent.iterdir()) == [shared]
    assert not list(shared.iterdir())


def test_the_batch_script(slurm: SlurmCluster, shared: Path) -> None:
    repository = Path(__file__).parents[2]
    log = shared.parent / "job.log"
    arguments = ("--nodes=2", f"--output={log}", "slurm/preflight.sbatch", *SETTINGS, f"run.dir={shared}")
    job = slurm.wait_for_job(slurm.sbatch(*arguments, env={"PYTHON": sys.executable}, cwd=repository), timeout=LIMIT_S)
    assert job["JobState"] == "COMPLETED", log.read_text()
    assert "4 ranks checked in " in log.read_text()
    assert "a job would start" in log.read_text()


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("torch", r"FAIL  versions        torch 2\."),
        ("clock", r"FAIL  clocks          n2 is (29\d|300)\.\d s ahead of n1"),  # at least, on a busy machine
    ],
)
def test_a_node_that_differs(slurm: SlurmCluster, shared: Path, fault: str, expected: str) -> None:
    (line,) = failed(run_preflight(slurm, sys.executable, FAULTY, fault, *SETTINGS, f"run.dir={shared}"))
    assert re.match(expected, line), line


def test_a_pair_of_nodes_that_is_slow(slurm: SlurmCluster, shared: Path) -> None:
    arguments = ("train.global_batch_size=126", f"run.dir={shared}", "--allreduce", "--json")
    result = run_preflight(slurm, sys.executable, FAULTY, "pair", *SETTINGS, *arguments, nodes=3).succeeded()
    report = json.loads("".join(line.partition(": ")[2] for line in result.stdout.splitlines()))
    ((one, other, times),) = report["slow_pairs"]
    assert (one, other) == ("n1", "n2")
    assert times > 5  # compared with milliseconds, or tens of them on a busy machine
    (pairs,) = [check for check in report["checks"] if check["name"] == "pairs of nodes"]
    assert pairs["status"] == "note"
    assert pairs["found"] == f"slower than the median: n1 – n2 {times:.1f}×"


def test_two_ranks_that_see_one_gpu(slurm: SlurmCluster, shared: Path) -> None:
    (line,) = failed(run_preflight(slurm, sys.executable, FAULTY, "gpu", *SETTINGS, f"run.dir={shared}", per_node=2))
    assert line.startswith("FAIL  devices         device=cuda: 2 ranks on n1 share 1 GPU; start one rank per GPU")


def test_ports_closed_between_two_nodes(slurm: SlurmCluster, shared: Path) -> None:
    """n2 and n3 reach n1, but not each other."""
    route = ("route", "add", "unreachable", "10.77.0.4/32")
    slurm.run("n2", "ip", *route).succeeded()
    try:
        (line,) = failed(run_preflight(slurm, *PREFLIGHT, f"run.dir={shared}", nodes=3))
    finally:
        slurm.run("n2", "ip", "route", "delete", *route[2:]).succeeded()
    assert "FAIL  ports           n2 cannot reach n3 (10.77.0.4 port " in line
    assert "n3 cannot reach n2" in line
    assert "n1" not in line


def test_a_port_without_a_listener(slurm: SlurmCluster, shared: Path) -> None:
    """MASTER_ADDR is n3, on which rank 0 does not run."""
    env = {"MASTER_ADDR": "n3", "MASTER_PORT": "20001"}
    result = run_preflight(slurm, "--nodelist=n1,n2", *PREFLIGHT, f"run.dir={shared}", "--wait", "5", env=env)
    assert result.status == 2, str(result)
    assert "FAIL  ranks" in result.stdout
    assert "rank 1 of 2 on n2 cannot connect to rank 0 at n3:20001: Connection refused" in result.stdout, str(result)


def test_a_port_that_is_in_use(slurm: SlurmCluster, shared: Path) -> None:
    server = "import socket, sys; s = socket.create_server(('', 20002)); print('up', flush=True); sys.stdin.read()"
    command = slurm.hosts["n1"].enter(sys.executable, "-c", server, cwd=shared)
    with Popen(command, stdin=PIPE, stdout=PIPE, text=True) as process:  # exits when its standard input closes
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        result = run_preflight(slurm, *PREFLIGHT, f"run.dir={shared}", "--wait", "5", env={"MASTER_PORT": "20002"})
    assert result.status == 2, str(result)
    assert "port 20002 on n1 is in use; set MASTER_PORT to a free port" in result.stdout, str(result)
    assert "the process that listens on n1:20002 is not rank 0" in result.stdout, str(result)


def test_a_host_that_cannot_be_resolved(slurm: SlurmCluster, shared: Path) -> None:
    result = run_preflight(slurm, *PREFLIGHT, f"run.dir={shared}", "--wait", "5", env={"MASTER_ADDR": "nosuchhost"})
    assert result.status == 2, str(result)
    assert "the host name nosuchhost of rank 0 cannot be resolved" in result.stdout


def test_a_host_name_that_resolves_to_loopback(slurm: SlurmCluster, shared: Path) -> None:
    """Debian's installer writes such an /etc/hosts."""
    hosts = shared.parent / "hosts"
    hosts.write_text("127.0.0.1 localhost\n127.0.1.1 n2\n10.77.0.1 ctl\n10.77.0.2 n1\n10.77.0.3 n2\n10.77.0.4 n3\n")
    with mounted(slurm, "n2", "--bind", hosts, "/etc/hosts"):
        (line,) = failed(run_preflight(slurm, *PREFLIGHT, f"run.dir={shared}"))
        pinned = run_preflight(slurm, *PREFLIGHT, f"run.dir={shared}", env={"GLOO_SOCKET_IFNAME": "eth0"})
    assert line.startswith(
        "FAIL  names           n2 resolves to 127.0.1.1, which no other node can reach; set GLOO_SOCKET_IFNAME=eth0"
    )
    pinned.succeeded()


def test_a_run_directory_that_is_not_shared(slurm: SlurmCluster, shared: Path) -> None:
    with mounted(slurm, "n2", "-t", "tmpfs", "tmpfs", shared):
        (line,) = failed(run_preflight(slurm, *PREFLIGHT, f"run.dir={shared}"))
    assert line.startswith(f"FAIL  run directory   n2: {shared} does not contain the file that rank 0 wrote")


def test_a_full_disk(slurm: SlurmCluster, shared: Path) -> None:
    with mounted(slurm, "n1", "-t", "tmpfs", "-o", "size=1m", "tmpfs", shared):
        (line,) = failed(slurm.srun("-N1", "-n2", "--nodelist=n1", *PREFLIGHT, f"run.dir={shared}", timeout=LIMIT_S))
    assert line.startswith(f"FAIL  disk space      {shared} has 1.0 MB free, 5 checkpoints take 3.")
    assert "; free some space" in line


def test_data_that_is_missing_on_one_node(slurm: SlurmCluster, shared: Path, fashion_mnist: dict[str, Path]) -> None:
    (root,) = {path.parent for path in fashion_mnist.values()}
    arguments = (*PREFLIGHT, "data.name=fashion_mnist", f"data.root={root}", f"run.dir={shared}")
    run_preflight(slurm, *arguments).succeeded()
    debian = Path("/usr/share/dataset-fashion-mnist")
    with mounted(slurm, "n2", "-t", "tmpfs", "tmpfs", root):
        if debian.exists():
            slurm.run("n2", "mount", "-t", "tmpfs", "tmpfs", debian).succeeded()
        try:
            (line,) = failed(run_preflight(slurm, *arguments))
        finally:
            if debian.exists():
                slurm.run("n2", "umount", debian).succeeded()
    assert line.startswith("FAIL  data            n2: data.name=fashion_mnist: its four IDX files (plain or .gz) ")
