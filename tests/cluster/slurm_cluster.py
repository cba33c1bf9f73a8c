"""A real SLURM cluster on one machine: each host has separate namespaces, and all files are in a temporary directory.

A host exists as long as the pipe from this process to its first process is open. When the pipe closes, the kernel
kills all processes in the host's PID namespace, daemons and jobs included, and removes its network. The pipe also
closes when this process dies in any way, so no daemon outlives the tests; only the temporary directory may remain.
Nothing changes outside the namespaces: no address, no link, no file in /etc or /run.
"""

import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conftest import CommandResult, run_command

PREFIX = "distlenet-slurm-"  # of the temporary directory, which appears in the command line of each host and daemon
SLURM_PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "scancel", "scontrol", "sinfo", "squeue", "munged")
PROGRAMS = (*SLURM_PROGRAMS, "ip", "unshare", "nsenter", "hostname", "mount")
CONTROLLER = "ctl"
START_S = 120.0
STOP_S = 10.0
ENDED_STATES = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}

# A host's first process: adopts and reaps orphans, and exits when the pipe on its standard input closes.
# $1 is the host's name, $2 the directory of the cluster.
FIRST_PROCESS = """
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
ip link set lo up
touch "$2/$1.up"
read -r || true
"""

SLURM_CONF = """
ClusterName=distlenet
SlurmctldHost={controller}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=15
StateSaveLocation={directory}/state
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmdSpoolDir={directory}/spool.%n
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=5
ReturnToService=2
JobRequeue=1
SlurmctldTimeout=30
SlurmdTimeout=20
MessageTimeout=15
KillWait=30
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

# Daemons on one machine need no cgroups, and detection may fail in a namespace.
CGROUP_CONF = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n"


class ClusterUnavailableError(RuntimeError):
    """This machine cannot run the cluster: the user is not root, or a program is not installed."""


@dataclass(frozen=True)
class Host:
    """A host and its first process, which holds the namespaces."""

    name: str
    process: subprocess.Popen[bytes]

    def enter(self, *command: object, cwd: Path) -> list[str]:
        """Return the command that runs ``command`` on this host."""
        pid = self.process.pid
        namespaces = (f"--target={pid}", "--net", "--uts", "--mount", f"--pid=/proc/{pid}/ns/pid_for_children")
        return ["nsenter", *namespaces, "env", f"--chdir={cwd}", *(str(word) for word in command)]

    def stop(self) -> None:
        """Close the pipe and wait until the host's processes have ended. A second call does nothing."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class SlurmCluster:
    """A controller named ctl and nodes n1, n2, ..., for the length of a ``with`` block.

    Commands run as root, see this machine's files, and get ``OMP_NUM_THREADS=1`` unless ``env`` sets another value.
    """

    directory: Path

    def __init__(self, nodes: int, cpus: int) -> None:
        """Raise ClusterUnavailableError if this machine cannot run the cluster."""
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self._cpus = cpus
        self._addresses = {name: f"10.77.0.{number}" for number, name in enumerate([CONTROLLER, *self.nodes], 1)}
        self._path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
        self.hosts: dict[str, Host] = {}
        self._daemons: dict[str, list[subprocess.Popen[bytes]]] = {}
        if os.geteuid() != 0:
            raise ClusterUnavailableError("a SLURM cluster in namespaces needs root")
        if missing := [program for program in PROGRAMS if shutil.which(program, path=self._path) is None]:
            raise ClusterUnavailableError(
                f"not installed: {', '.join(missing)}; on Debian: apt-get install -y --no-install-recommends "
                "slurmctld slurmd slurm-client munge iproute2"
            )

    def __enter__(self) -> "SlurmCluster":
        """Start all hosts and daemons, and return when every node is idle."""
        self.directory = Path(tempfile.mkdtemp(prefix=PREFIX))
        try:
            self.directory.chmod(0o711)  # munged requires that everybody can reach its socket
            self._write_files()
            for name in (CONTROLLER, *self.nodes):
                self._start_host(name)
            self._connect()
            self._start_daemons()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop every host and its processes, and remove the directory."""
        for host in self.hosts.values():
            host.stop()
        for daemons in self._daemons.values():
            for daemon in daemons:
                daemon.wait()
        shutil.rmtree(self.directory)

    def run(
        self,
        host: str,
        *command: object,
        timeout: float = 60,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> CommandResult:
        """Run a command on a host; if it exceeds ``timeout``, fail with its output."""
        entered = self.hosts[host].enter(*command, cwd=cwd or self.directory)
        return run_command(*entered, timeout=timeout, env={**self._environment(), **(env or {})}, cwd=self.directory)

    def srun(
        self, *command: object, timeout: float = 60, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> CommandResult:
        """Run a job from the controller; each line of output starts with the number of its task, ``0: text``."""
        return self.run(CONTROLLER, "srun", "--label", *command, timeout=timeout, env=env, cwd=cwd)

    def sbatch(self, *command: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
        """Submit a batch job from the controller and return its id."""
        result = self.run(CONTROLLER, "sbatch", "--parsable", *command, env=env, cwd=cwd)
        return result.succeeded().stdout.strip()

    def jobs(self) -> list[dict[str, str]]:
        """Return the fields of every job that SLURM still lists."""
        listed = self.run(CONTROLLER, "scontrol", "-o", "show", "job").succeeded().stdout
        return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in listed.splitlines() if line.startswith("JobId=")]

    def job(self, job_id: str) -> dict[str, str]:
        """Return the fields of one job, such as JobState, ExitCode, NodeList and Restarts."""
        return {fields["JobId"]: fields for fields in self.jobs()}[job_id]

    def wait_for_job(self, job_id: str, *states: str, timeout: float) -> dict[str, str]:
        """Wait until a job is in one of ``states``, by default any final state; return its fields."""
        wanted = set(states) or ENDED_STATES
        self.poll(lambda: self.job(job_id)["JobState"] in wanted, f"job {job_id} in {sorted(wanted)}", timeout)
        return self.job(job_id)

    def cancel_all(self, timeout: float = 120) -> None:
        """Cancel all queued and running jobs, so that the next test starts with an empty queue."""
        if queued := self._queued():
            self.run(CONTROLLER, "scancel", *queued).succeeded()
        self.poll(lambda: not self._queued(), "no job left after scancel", timeout)

    def cut(self, node: str) -> None:
        """Disconnect a node's network. Its processes continue."""
        self._ip(CONTROLLER, "link", "set", f"v{node}", "down")

    def heal(self, node: str) -> None:
        """Reconnect a node's network."""
        self._ip(CONTROLLER, "link", "set", f"v{node}", "up")

    def power_off(self, node: str) -> None:
        """Kill a node. Its network is cut first, so that no process can close its connections."""
        self.cut(node)
        self.hosts.pop(node).stop()
        for daemon in self._daemons.pop(node):
            daemon.wait()
        self.run(CONTROLLER, "ip", "link", "delete", f"v{node}")  # fails if the kernel has already removed it

    def power_on(self, node: str) -> None:
        """Start a node that was powered off, and wait until it is idle."""
        (self.directory / f"{node}.up").unlink()
        self._start_host(node)
        self._connect_node(node)
        self._start_node(node)
        self._wait_for_start(self._all_idle, "every node idle")

    def hosts_of(self, job_id: str) -> list[str]:
        """Return the names of a job's nodes."""
        nodes = self.job(job_id)["NodeList"]
        return self.run(CONTROLLER, "scontrol", "show", "hostnames", nodes).succeeded().stdout.split()

    def poll(self, condition: Callable[[], bool], description: str, timeout: float) -> None:
        """Wait until ``condition`` holds. Raise TimeoutError with all logs if it does not in time."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {timeout} s for: {description}\n{self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        """Return the end of each host's and daemon's output."""
        logs = sorted(self.directory.glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}" for log in logs)

    def _environment(self) -> dict[str, str]:
        return {"PATH": self._path, "SLURM_CONF": str(self.directory / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def _write_files(self) -> None:
        nodes = (
            f"NodeName={node} NodeAddr={self._addresses[node]} CPUs={self._cpus} RealMemory=8000 Gres=gpu:2"
            for node in self.nodes
        )
        hosts = {"localhost": "127.0.0.1", **self._addresses}
        files = {
            "hosts": "".join(f"{address} {name}\n" for name, address in hosts.items()),
            "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",  # no DNS: an unknown name fails at once
            "slurm.conf": SLURM_CONF.format(
                directory=self.directory,
                controller=CONTROLLER,
                address=self._addresses[CONTROLLER],
                nodes="\n".join(nodes),
            ),
            "cgroup.conf": CGROUP_CONF,
            "gres.conf": f"Name=gpu File={self.directory}/gpu[0-1]\n",
        }
        for name, text in files.items():
            (self.directory / name).write_text(text)
        for number in (0, 1):  # SLURM requires device files; these are null devices
            os.mknod(self.directory / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (self.directory / "state").mkdir()
        key = self.directory / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))

    def _start_host(self, name: str) -> None:
        namespaces = ("--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        command = ["unshare", *namespaces, "bash", "-c", FIRST_PROCESS, "host", name, str(self.directory)]
        process = self._start(command, f"{name}.log", stdin=subprocess.PIPE)
        self.hosts[name] = Host(name, process)
        self._wait_for_start((self.directory / f"{name}.up").exists, f"host {name}")

    def _connect(self) -> None:
        """Connect all hosts by a bridge in the controller's network namespace."""
        self._ip(CONTROLLER, "link", "add", "switch", "type", "bridge")
        self._ip(CONTROLLER, "address", "add", f"{self._addresses[CONTROLLER]}/24", "dev", "switch")
        self._ip(CONTROLLER, "link", "set", "switch", "up")
        for node in self.nodes:
            self._connect_node(node)

    def _connect_node(self, node: str) -> None:
        cable = f"link add v{node} type veth peer name eth0 netns {self.hosts[node].process.pid}".split()
        # Only the network namespace: in the controller's PID namespace the node's PID does not exist.
        controller = self.hosts[CONTROLLER].process.pid
        run_command("nsenter", f"--target={controller}", "--net", "ip", *cable).succeeded()
        self._ip(CONTROLLER, "link", "set", f"v{node}", "master", "switch", "up")
        self._ip(node, "address", "add", f"{self._addresses[node]}/24", "dev", "eth0")
        self._ip(node, "link", "set", "eth0", "up")

    def _ip(self, host: str, *command: str) -> None:
        self.run(host, "ip", *command).succeeded()

    def _start_daemons(self) -> None:
        files = (f"--{name}={self.directory}/munge.{name}" for name in ("socket", "pid-file", "seed-file"))
        self._start_daemon(CONTROLLER, "munged", "--foreground", f"--key-file={self.directory}/munge.key", *files)
        # One munged serves all hosts: its socket is a file, which network namespaces share.
        self._wait_for_start((self.directory / "munge.socket").exists, "munged")
        self._start_daemon(CONTROLLER, "slurmctld", "-D", "-f", str(self.directory / "slurm.conf"))
        for node in self.nodes:
            self._start_node(node)
        self._wait_for_start(self._all_idle, "every node idle")

    def _start_node(self, node: str) -> None:
        self._start_daemon(node, "slurmd", "-D", "-f", str(self.directory / "slurm.conf"))

    def _start_daemon(self, host: str, *command: str) -> None:
        entered = self.hosts[host].enter(*command, cwd=self.directory)
        daemon = self._start(entered, f"{host}.{command[0]}.log", stdin=subprocess.DEVNULL)
        self._daemons.setdefault(host, []).append(daemon)

    def _start(self, command: list[str], log: str, stdin: int) -> subprocess.Popen[bytes]:
        """Start a process of a host in a new session, so that Ctrl-C reaches only the tests."""
        env = {**os.environ, **self._environment()}
        with (self.directory / log).open("ab") as output:
            return subprocess.Popen(
                command, stdin=stdin, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )

    def _wait_for_start(self, condition: Callable[[], bool], description: str) -> None:
        """Poll, and fail at once if a host or daemon has ended."""

        def started() -> bool:
            hosts = (host.process for host in self.hosts.values())
            for process in (*hosts, *(daemon for daemons in self._daemons.values() for daemon in daemons)):
                if process.poll() is not None:
                    raise RuntimeError(f"ended with status {process.returncode}: {process.args!r}\n{self.logs()}")
            return condition()

        self.poll(started, description, START_S)

    def _queued(self) -> list[str]:
        listed = self.run(CONTROLLER, "squeue", "--noheader", "--format=%A").succeeded()
        return listed.stdout.split()

    def _all_idle(self) -> bool:
        idle = self.run(CONTROLLER, "sinfo", "--noheader", "--Node", "--states=idle", "--format=%N")
        return idle.status == 0 and sorted(idle.stdout.split()) == sorted(self.nodes)
