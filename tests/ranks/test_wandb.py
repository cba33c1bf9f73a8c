"""W&B's real client, offline and with a fake server on loopback."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import LIMIT_S, Job, run_command
from forked import run_python, run_ranks
from wandb_server import WandbServer

from distlenet.prove.processes import free_port
from distlenet.tracking.base import NONDETERMINISTIC_KEYS
from distlenet.tracking.wandb import row, row_number

pytestmark = pytest.mark.ranks

SETTINGS = ("data.name=digits", "train.epochs=4", "train.log_every=5", "checkpoint.every_steps=4", "run.name=run")
ALL_ROWS, ALL_ROWS_S = ("wandb.finish_timeout_s=600",), 400.0  # the process that sends them has the lowest priority
KILLED_AT_STEP_32 = """
import os, signal
from distlenet import train
from distlenet.distributed.entry_point import run_entry
from distlenet.training.trainer import Trainer

class KilledAtStep32(Trainer):
    def step(self, batch):
        result = super().step(batch)
        marker = self.run_dir / "killed"
        self.checkpoints.store.wait()  # an optional checkpoint is skipped while another is written
        if self.state.step == 32 and not marker.exists() and os.environ["RANK"] == "0":
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return result

run_entry(lambda: train.main(trainer_class=KilledAtStep32))
"""


@pytest.fixture
def server():
    server = WandbServer()
    yield server
    server.close()


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def offline_rows(run: Path) -> tuple[str, list[dict]]:
    """Read the id and the rows of an offline run with W&B's own reader."""
    (directory,) = (run / "wandb").glob("offline-run-*")
    inspect = (sys.executable, "-m", "wandb", "leet", "inspect", directory, "--json")
    entries = [json.loads(line) for line in run_command(*inspect).succeeded().stdout.splitlines()]
    summary = json.loads(run_command(*inspect, "--summary").succeeded().stdout)
    return summary["run_id"], [entry["history"]["item"] for entry in entries if entry["type"] == "history"]


def assert_rows(rows: list[dict], records: list[dict], ignore=frozenset()) -> None:
    """Check that ``rows`` are ``records``, each once and in order. A last row may contain the tables."""
    rows = [r for r in rows if not any(key.startswith("test/most_confident_mistakes") for key in r)]
    assert [r["_step"] for r in rows] == [row_number(record) for record in records]
    for received, record in zip(rows, records, strict=True):
        expected = {k: v for k, v in row(record).items() if k.partition("/")[2] not in ignore}
        assert {key: received.get(key) for key in expected} == expected


def test_a_killed_offline_run_has_each_step_once(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(KILLED_AT_STEP_32)
    environ = {"WANDB_MODE": "offline"}
    command = (program, *SETTINGS, *ALL_ROWS, f"run.dir={tmp_path}")
    assert run_ranks(2, *command, env=environ, timeout=ALL_ROWS_S).status != 0
    first = json.loads((tmp_path / "run/starts.jsonl").read_text())["run_id"]
    assert records(tmp_path / "run")[-1]["step"] == 29
    ended = run_ranks(2, *command, env=environ, timeout=ALL_ROWS_S).succeeded()
    assert "resumed at step 28" in ended.stdout
    run_id, rows = offline_rows(tmp_path / "run")
    assert run_id == first
    assert_rows(rows, records(tmp_path / "run"))


def test_a_killed_online_run_of_four_ranks_is_one_run_with_each_step_once(tmp_path, server):
    program = tmp_path / "program.py"
    program.write_text(KILLED_AT_STEP_32)
    command = (program, *SETTINGS, *ALL_ROWS, f"run.dir={tmp_path}", "checkpoint.every_steps=7")
    assert run_ranks(4, *command, env=server.environ, timeout=ALL_ROWS_S).status != 0
    ended = run_ranks(4, *command, env=server.environ, timeout=ALL_ROWS_S).succeeded()
    assert "resumed at step 28" in ended.stdout
    (run_id,) = server.rows
    assert run_id == json.loads((tmp_path / "run/starts.jsonl").read_text().splitlines()[0])["run_id"]
    # Both starts recorded step 29, with equal results and different times.
    assert_rows(server.history(run_id), records(tmp_path / "run"), NONDETERMINISTIC_KEYS)
    assert server.sent_rows == len(server.history(run_id))
    assert server.configs[run_id]["train"]["value"]["log_every"] == 5
    assert "k" * 40 not in json.dumps(server.configs)


def test_a_slow_server_receives_everything(tmp_path, server):
    server.behavior = "slow"
    command = ("-m", "distlenet.train", *SETTINGS, *ALL_ROWS, f"run.dir={tmp_path}")
    ended = run_python(*command, env=server.environ, timeout=ALL_ROWS_S).succeeded()
    assert "distlenet:" not in ended.stderr
    (run_id,) = server.rows
    assert_rows(server.history(run_id), records(tmp_path / "run"))


def test_with_a_wrong_key_the_run_is_kept_offline(tmp_path, server):
    server.behavior = "wrong key"
    command = ("-m", "distlenet.train", *SETTINGS, *ALL_ROWS, f"run.dir={tmp_path}")
    ended = run_python(*command, env=server.environ, timeout=ALL_ROWS_S).succeeded()
    assert len(re.findall("distlenet: W&B: .*; this run is kept offline, wandb sync sends it later", ended.stderr)) == 1
    assert ended.stderr.count("distlenet:") == 1
    run_id, rows = offline_rows(tmp_path / "run")
    assert run_id == json.loads((tmp_path / "run/starts.jsonl").read_text())["run_id"]
    assert_rows(rows, records(tmp_path / "run"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"k" * 40 in path.read_bytes() for path in files)  # the key is not saved


def test_a_server_that_does_not_answer_in_time_leaves_the_run_offline(tmp_path, server):
    """In the time of W&B's own variable."""
    server.behavior = "hang"
    environ = {**server.environ, "WANDB_INIT_TIMEOUT": "1"}
    command = ("-m", "distlenet.train", *SETTINGS, *ALL_ROWS, f"run.dir={tmp_path}")
    ended = run_python(*command, env=environ, timeout=ALL_ROWS_S).succeeded()
    assert "this run is kept offline, wandb sync sends it later" in ended.stderr
    assert_rows(offline_rows(tmp_path / "run")[1], records(tmp_path / "run"))


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of 64 KiB on the directory in which W&B keeps the run."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    directory = tmp_path / "run/wandb"
    directory.mkdir(parents=True)
    run_command("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", directory).succeeded()
    yield directory
    run_command("umount", "--lazy", directory).succeeded()


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_full_disk_stops_only_wandb(tmp_path, server, small_disk, mode):
    with (small_disk / "full").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    environ = {**server.environ, "WANDB_MODE": mode}
    command = ("-m", "distlenet.train", *SETTINGS, *ALL_ROWS, f"run.dir={tmp_path}")
    ended = run_python(*command, env=environ, timeout=ALL_ROWS_S).succeeded()
    assert "W&B: OSError: [Errno 28] No space left on device; nothing more is sent there now" in ended.stderr
    assert "--replay-wandb" in ended.stderr
    assert [r["step"] for r in records(tmp_path / "run") if r["split"] == "test"] == [12, 24, 36, 48]


def test_a_preempted_run_is_marked_and_a_finished_one_sends_its_best_checkpoint(tmp_path, server):
    arguments = (
        *SETTINGS,
        f"run.dir={tmp_path}",
        "wandb.log_checkpoints=true",
        "wandb.finish_timeout_s=240",
        "checkpoint.preemption_grace_s=240",
        "train.epochs=40",
        "data.validation=0.1",
    )
    held = Path(__file__).with_name("held_program.py")
    with Job(tmp_path, sys.executable, held, tmp_path, "100", *arguments, env=server.environ) as job:
        job.wait_for_step(5)
        job.process.send_signal(signal.SIGUSR2)
        assert job.wait(ALL_ROWS_S).status == 75
    (run_id,) = server.rows
    assert server.endings[run_id]["preempting"] is True
    assert not any("CreateArtifact" in query for query in server.queries)
    command = ("-m", "distlenet.train", *arguments)
    run_python(*command, env=server.environ, timeout=ALL_ROWS_S).succeeded()
    assert server.endings[run_id] == {"exitcode": 0, "preempting": False}
    assert any("CreateArtifact" in query for query in server.queries)
    assert_rows(server.history(run_id), records(tmp_path / "run"), NONDETERMINISTIC_KEYS)


@pytest.mark.parametrize("behavior", ["error", "hang", "drop", "unreachable"])
def test_a_broken_server_causes_one_warning(tmp_path, server, behavior):
    server.behavior = behavior
    environ = {
        **server.environ,
        **({"WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}"} if behavior == "unreachable" else {}),
    }
    command = ("-m", "distlenet.train", *SETTINGS, f"run.dir={tmp_path}", "wandb.finish_timeout_s=0.5")
    ended = run_python(*command, env=environ).succeeded()
    assert ended.stderr.count("distlenet:") == 1
    assert "W&B: the process that sends the records was not done within 0.5 s (wandb.finish_timeout_s)" in ended.stderr
    assert [r["step"] for r in records(tmp_path / "run") if r["split"] == "test"] == [12, 24, 36, 48]
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 48


def assert_lowest_priority(training: int) -> None:
    """Wait until W&B's own process runs, and the processes below ``training`` have the lowest priority."""
    deadline = time.monotonic() + LIMIT_S
    found: dict[str, tuple[int, bool]] = {}
    while time.monotonic() < deadline:
        with suppress(psutil.Error, OSError):
            processes = psutil.Process(training).children(recursive=True)
            found = {
                " ".join(p.cmdline()): (os.sched_getscheduler(p.pid), has_least_share(p.pid, training))
                for p in processes
            }
        if any("wandb-core" in command for command in found) and set(found.values()) == {(os.SCHED_IDLE, True)}:
            return
        time.sleep(0.1)
    raise AssertionError(found)


LAUNCHES_A_SIDECAR = """
import math, os, signal, sys, time
import psutil
from contextlib import suppress
from pathlib import Path
from distlenet.config.loading import load_config
from distlenet.tracking.sidecar import Sidecar
sidecar = Sidecar(Path(sys.argv[1]), load_config([], ["wandb.mode=offline"]).to_dict(), lambda: math.inf)
sidecar.launch()
cores, deadline = [], time.monotonic() + 240
while not cores and time.monotonic() < deadline:
    time.sleep(0.05)
    with suppress(psutil.Error):  # a process has just exited
        cores = [p for p in psutil.Process().children(recursive=True) if "wandb-core" in " ".join(p.cmdline())]
print(sidecar.process.pid, cores[0].pid, flush=True)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sidecar.close()
print("closed", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["killed", "closed"])
def test_a_training_that_ends_before_its_start_leaves_no_process(tmp_path, how):
    command = [sys.executable, "-c", LAUNCHES_A_SIDECAR, str(tmp_path), how]
    environ = {**os.environ, "WANDB_MODE": "offline"}
    with subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as training:
        assert training.stdout is not None
        pids = training.stdout.readline().split()
        if how == "closed":
            assert training.stdout.readline() == "closed\n"
        psutil.wait_procs([psutil.Process(int(pid)) for pid in pids if psutil.pid_exists(int(pid))], timeout=LIMIT_S)
        assert not any(psutil.pid_exists(int(pid)) for pid in pids)
        training.communicate("")


def has_least_share(process: int, training: int) -> bool:
    """Return whether a process is in the training's session or in one with the least CPU share."""
    group = Path(f"/proc/{process}/autogroup")
    text = group.read_text() if group.exists() else ""  # Linux may not group by session
    return not text or os.getsid(process) == os.getsid(training) or text.endswith("nice 19\n")


def test_the_sidecar_has_the_lowest_priority_while_the_ranks_train(tmp_path):
    command = [sys.executable, "-m", "distlenet.train", *SETTINGS, f"run.dir={tmp_path}", "train.epochs=2000"]
    environ = {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as training:
        try:
            assert training.stdout is not None
            assert any("test accuracy" in line for line in training.stdout)
            assert_lowest_priority(training.pid)
        finally:
            training.kill()


def test_training_does_not_wait_for_wandb(tmp_path, server):
    """The run completes before the server answers the first request."""
    server.behavior = "hang"
    command = [sys.executable, "-m", "distlenet.train", *SETTINGS, *ALL_ROWS, f"run.dir={tmp_path}"]
    environ = {**os.environ, **server.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert any(line.startswith("Files of this run") for line in process.stdout)
        assert not server.rows  # nothing was received
        server.released.set()
        server.behavior = "ok"
        process.wait(ALL_ROWS_S)
    finally:
        process.kill()
    assert process.returncode == 0
    (run_id,) = server.rows
    assert_rows(server.history(run_id), records(tmp_path / "run"))


def test_a_replay_sends_only_what_is_missing(tmp_path, server):
    command = ("-m", "distlenet.train", *SETTINGS, f"run.dir={tmp_path}", "train.max_steps=20")
    run_python(*command, env={"WANDB_MODE": "disabled"}).succeeded()
    replay = ("-m", "distlenet.report", tmp_path / "run", "--replay-wandb")
    for _ in range(2):
        run_python(*replay, env=server.environ).succeeded()
        (run_id,) = server.rows
        assert_rows(server.history(run_id), records(tmp_path / "run"))
    assert server.sent_rows == len(records(tmp_path / "run")) + 1  # the row with the tables
