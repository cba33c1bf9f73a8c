"""A real SLURM cluster on one machine: each host in namespaces of its own, all in one temporary folder.

A host lives exactly as long as a pipe from this process to the host's first process stays open. Closing the
pipe kills everything in the host's PID namespace, daemons and jobs alike, and the kernel then drops its
network. The pipe also closes when this process dies, however it dies, so no daemon outlives the tests; then
only the folder is left, by whose name it is recognised.
Nothing is changed outside the namespaces: no address, no link, no file in /etc or /run.
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

PREFIX = "distlenet-slurm-"  # of the temporary folder, which is on the command line of each host and daemon
SLURM_PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "scancel", "scontrol", "sinfo", "squeue", "munged")
PROGRAMS = (*SLURM_PROGRAMS, "ip", "unshare", "nsenter", "hostname", "mount")
CONTROLLER = "ctl"
START_S = 60.0
STOP_S = 10.0
ENDED_STATES = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}

# A host's first process. It adopts and reaps what its daemons leave behind, and ends with the pipe on its
# standard input. $1 is the host's name, $2 the folder of the cluster.
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
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
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
SlurmdTimeout=10
MessageTimeout=5
KillWait=5
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

# Daemons on one machine need no cgroup of their own, and detection may fail in a namespace.
CGROUP_CONF = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n"


class ClusterUnavailableError(RuntimeError):
    """This machine cannot run the cluster: another user than root, or a program is not installed."""


@dataclass(frozen=True)
class Host:
    """One host: its name, and the process, by this machine's pid, that holds its namespaces."""

    name: str
    process: subprocess.Popen[bytes]

    def enter(self, *words: object, cwd: Path) -> list[str]:
        """Write the command that runs ``words`` on this host."""
        pid = self.process.pid
        spaces = (f"--target={pid}", "--net", "--uts", "--mount", f"--pid=/proc/{pid}/ns/pid_for_children")
        return ["nsenter", *spaces, "env", f"--chdir={cwd}", *(str(word) for word in words)]

    def stop(self) -> None:
        """Close the pipe, and wait until no process of the host is left. A second call does nothing."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class SlurmCluster:
    """A controller named ctl and nodes n1, n2, ..., from ``with`` to the end of its block.

    Commands run as root, see this machine's files, and get ``OMP_NUM_THREADS=1`` unless told otherwise.
    """

    folder: Path

    def __init__(self, nodes: int, cpus: int) -> None:
        """Check that this machine can run the cluster; raise ClusterUnavailableError where it cannot."""
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
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        try:
            self.folder.chmod(0o711)  # munged wants its socket within everybody's reach
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
        """Stop every host with all that runs on it, and remove the folder."""
        for host in self.hosts.values():
            host.stop()
        for daemons in self._daemons.values():
            for daemon in daemons:
                daemon.wait()
        shutil.rmtree(self.folder)

    def run(
        self,
        host: str,
        *words: object,
        timeout: float = 60,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> CommandResult:
        """Run a command on a host, to its end or to the time limit, where the test fails with its output."""
        command = self.hosts[host].enter(*words, cwd=cwd or self.folder)
        return run_command(*command, timeout=timeout, env={**self._environment(), **(env or {})}, cwd=self.folder)

    def srun(
        self, *words: object, timeout: float = 60, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> CommandResult:
        """Run a job from the controller, each line of output with its task before it: ``0: text``."""
        return self.run(CONTROLLER, "srun", "--label", *words, timeout=timeout, env=env, cwd=cwd)

    def sbatch(self, *words: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
        """Submit a batch job from the controller and return its id."""
        ended = self.run(CONTROLLER, "sbatch", "--parsable", *words, env=env, cwd=cwd)
        return ended.succeeded().stdout.strip()

    def jobs(self) -> list[dict[str, str]]:
        """Return the fields of every job that SLURM still knows."""
        listed = self.run(CONTROLLER, "scontrol", "-o", "show", "job").succeeded().stdout
        return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in listed.splitlines() if line.startswith("JobId=")]

    def job(self, job_id: str) -> dict[str, str]:
        """Return the fields of one job, such as JobState, ExitCode, NodeList and Restarts."""
        return {fields["JobId"]: fields for fields in self.jobs()}[job_id]

    def wait_for_job(self, job_id: str, *states: str, timeout: float) -> dict[str, str]:
        """Wait until a job is in one of the states, by default in any that is final; return its fields."""
        wanted = set(states) or ENDED_STATES
        self.poll(lambda: self.job(job_id)["JobState"] in wanted, f"job {job_id} in {sorted(wanted)}", timeout)
        return self.job(job_id)

    def cancel_all(self, timeout: float = 60) -> None:
        """Cancel what is still queued or running, so that no test meets the jobs of another."""
        if queued := self._queued():
            self.run(CONTROLLER, "scancel", *queued).succeeded()
        self.poll(lambda: not self._queued(), "no job left after scancel", timeout)

    def cut(self, node: str) -> None:
        """Pull a node's network cable. Its processes run on."""
        self._ip(CONTROLLER, "link", "set", f"v{node}", "down")

    def heal(self, node: str) -> None:
        """Plug the cable in again."""
        self._ip(CONTROLLER, "link", "set", f"v{node}", "up")

    def power_off(self, node: str) -> None:
        """Kill a node at once. The cable goes first, so that no process can say goodbye to its peers."""
        self.cut(node)
        self.hosts.pop(node).stop()
        for daemon in self._daemons.pop(node):
            daemon.wait()
        self.run(CONTROLLER, "ip", "link", "delete", f"v{node}")  # unless the kernel was faster

    def power_on(self, node: str) -> None:
        """Start a node that was powered off, and wait until SLURM has it back."""
        (self.folder / f"{node}.up").unlink()
        self._start_host(node)
        self._connect_node(node)
        self._start_node(node)
        self._wait_for_start(self._all_idle, "every node idle")

    def hosts_of(self, job_id: str) -> list[str]:
        """Return the names of a job's nodes."""
        nodes = self.job(job_id)["NodeList"]
        return self.run(CONTROLLER, "scontrol", "show", "hostnames", nodes).succeeded().stdout.split()

    def poll(self, condition: Callable[[], bool], what: str, timeout: float) -> None:
        """Ask until ``condition`` holds; raise TimeoutError, with all logs, where it does not in time."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {timeout} s for: {what}\n{self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        """Return the end of what each host and daemon printed."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}" for log in logs)

    def _environment(self) -> dict[str, str]:
        return {"PATH": self._path, "SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def _write_files(self) -> None:
        nodes = (
            f"NodeName={node} NodeAddr={self._addresses[node]} CPUs={self._cpus} RealMemory=8000 Gres=gpu:2"
            for node in self.nodes
        )
        hosts = {"localhost": "127.0.0.1", **self._addresses}
        files = {
            "hosts": "".join(f"{address} {name}\n" for name, address in hosts.items()),
            "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",  # an unknown host fails at once
            "slurm.conf": SLURM_CONF.format(
                folder=self.folder,
                controller=CONTROLLER,
                address=self._addresses[CONTROLLER],
                nodes="\n".join(nodes),
            ),
            "cgroup.conf": CGROUP_CONF,
            "gres.conf": f"Name=gpu File={self.folder}/gpu[0-1]\n",
        }
        for name, text in files.items():
            (self.folder / name).write_text(text)
        for number in (0, 1):  # device files, as SLURM wants them, of the null device
            os.mknod(self.folder / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))

    def _start_host(self, name: str) -> None:
        spaces = ("--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        words = ["unshare", *spaces, "bash", "-c", FIRST_PROCESS, "host", name, str(self.folder)]
        process = self._start(words, f"{name}.log", stdin=subprocess.PIPE)
        self.hosts[name] = Host(name, process)
        self._wait_for_start((self.folder / f"{name}.up").exists, f"host {name}")

    def _connect(self) -> None:
        """Join all hosts by a switch, which is a bridge in the controller's network namespace."""
        self._ip(CONTROLLER, "link", "add", "switch", "type", "bridge")
        self._ip(CONTROLLER, "address", "add", f"{self._addresses[CONTROLLER]}/24", "dev", "switch")
        self._ip(CONTROLLER, "link", "set", "switch", "up")
        for node in self.nodes:
            self._connect_node(node)

    def _connect_node(self, node: str) -> None:
        cable = f"link add v{node} type veth peer name eth0 netns {self.hosts[node].process.pid}".split()
        # Enters the network namespace alone: in the controller's PID namespace the node's pid has no meaning.
        controller = self.hosts[CONTROLLER].process.pid
        run_command("nsenter", f"--target={controller}", "--net", "ip", *cable).succeeded()
        self._ip(CONTROLLER, "link", "set", f"v{node}", "master", "switch", "up")
        self._ip(node, "address", "add", f"{self._addresses[node]}/24", "dev", "eth0")
        self._ip(node, "link", "set", "eth0", "up")

    def _ip(self, host: str, *words: str) -> None:
        self.run(host, "ip", *words).succeeded()

    def _start_daemons(self) -> None:
        files = (f"--{name}={self.folder}/munge.{name}" for name in ("socket", "pid-file", "seed-file"))
        self._start_daemon(CONTROLLER, "munged", "--foreground", f"--key-file={self.folder}/munge.key", *files)
        # One munged serves all hosts: its socket is a file, which network namespaces do not part.
        self._wait_for_start((self.folder / "munge.socket").exists, "munged")
        self._start_daemon(CONTROLLER, "slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
        for node in self.nodes:
            self._start_node(node)
        self._wait_for_start(self._all_idle, "every node idle")

    def _start_node(self, node: str) -> None:
        self._start_daemon(node, "slurmd", "-D", "-f", str(self.folder / "slurm.conf"))

    def _start_daemon(self, host: str, *words: str) -> None:
        command = self.hosts[host].enter(*words, cwd=self.folder)
        started = self._start(command, f"{host}.{words[0]}.log", stdin=subprocess.DEVNULL)
        self._daemons.setdefault(host, []).append(started)

    def _start(self, words: list[str], log: str, stdin: int) -> subprocess.Popen[bytes]:
        """Start what runs as long as its host, in a context of its own: Ctrl-C is for the tests alone."""
        env = {**os.environ, **self._environment()}
        with (self.folder / log).open("ab") as output:
            return subprocess.Popen(
                words, stdin=stdin, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )

    def _wait_for_start(self, condition: Callable[[], bool], what: str) -> None:
        """Poll, but fail at once when something that should run on has ended."""

        def started() -> bool:
            hosts = (host.process for host in self.hosts.values())
            for process in (*hosts, *(daemon for daemons in self._daemons.values() for daemon in daemons)):
                if process.poll() is not None:
                    raise RuntimeError(f"ended with status {process.returncode}: {process.args!r}\n{self.logs()}")
            return condition()

        self.poll(started, what, START_S)

    def _queued(self) -> list[str]:
        listed = self.run(CONTROLLER, "squeue", "--noheader", "--format=%A").succeeded()
        return listed.stdout.split()

    def _all_idle(self) -> bool:
        idle = self.run(CONTROLLER, "sinfo", "--noheader", "--Node", "--states=idle", "--format=%N")
        return idle.status == 0 and sorted(idle.stdout.split()) == sorted(self.nodes)
