"""The process that sends records to W&B and TensorBoard: its start, its end, and its priority."""

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import Future

import pytest
from conftest import LIMIT_S, run_command

from distlenet.config.loading import load_config
from distlenet.tracking import sender
from distlenet.tracking.priority import process_tree
from distlenet.tracking.sender import JsonlTail, make_sinks, receive, send, statuses
from distlenet.tracking.sidecar import Sidecar
from distlenet.utils.errors import Preempted, UserError

pytestmark = pytest.mark.unit

NO_WANDB = ["wandb.mode=disabled"]
MLFLOW = ["mlflow.enabled=true", "mlflow.tracking_uri=http://localhost:5000"]
RECORD = {"split": "train", "step": 50, "epoch": 2}


def make_sidecar(run_dir, *settings, seconds_left=math.inf):
    return Sidecar(run_dir, load_config([], ["wandb.mode=offline", *settings]).to_dict(), lambda: seconds_left)


@pytest.fixture
def use_command(monkeypatch):
    """Let sidecars run another command than the sender."""
    popen = subprocess.Popen

    def use(*command):
        monkeypatch.setattr("distlenet.tracking.sidecar.subprocess.Popen", lambda _, **kw: popen(command, **kw))

    return use


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["wandb.mode=online"], r"package wandb: is not installed; pip install wandb, or give wandb\.mode=disabled"),
        ([*NO_WANDB, "tracking.tensorboard=true"], r"pip install 'distlenet\[tensorboard\]', or give tracking\."),
        ([*NO_WANDB, *MLFLOW], r"package mlflow: is not installed; pip install 'distlenet\[mlflow\]', or"),
    ],
)
def test_a_missing_package_is_an_error_before_training(tmp_path, monkeypatch, settings, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=message):
        make_sidecar(tmp_path, *settings)


def test_no_process_without_a_service(tmp_path):
    sidecar = make_sidecar(tmp_path, "wandb.mode=disabled")
    sidecar.launch()
    sidecar.start({"complete": False})
    assert sidecar.process is None
    sidecar.log(RECORD)
    sidecar.close()


def test_a_process_that_cannot_be_started_is_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", "/does/not/exist")
    sidecar = make_sidecar(tmp_path)
    sidecar.launch()
    sidecar.close()
    assert "W&B: cannot be started: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("complete", [True, None])
def test_a_process_without_a_job_is_ended_at_once(tmp_path, complete):
    """A complete run has nothing to send, and a training may fail before its start."""
    sidecar = make_sidecar(tmp_path)
    sidecar.launch()
    process = sidecar.process
    if complete:
        sidecar.start({"complete": True})
    sidecar.close()
    assert process.returncode == -9
    assert not (tmp_path / "wandb").exists()


def test_a_process_whose_training_ends_before_its_start_exits(tmp_path):
    sidecar = make_sidecar(tmp_path)
    sidecar.launch()
    sidecar.process.stdin.close()
    assert sidecar.process.wait(LIMIT_S) == 0


def test_the_process_gets_the_job_and_the_outcome(tmp_path, use_command):
    use_command(sys.executable, "-c", f"import sys; open({str(tmp_path / 'input')!r}, 'w').write(sys.stdin.read())")
    for outcome in ("finished", "failed", "preempted"):
        sidecar = make_sidecar(tmp_path)
        sidecar.launch()
        sidecar.start({"complete": False, "run_id": "abc"})
        if outcome == "finished":
            sidecar.finish({})
        try:
            if outcome == "preempted":
                raise Preempted("step 3")
        except Preempted:
            sidecar.close()
        sidecar.close()
        first, last = (tmp_path / "input").read_text().splitlines()
        job = json.loads(first)
        assert (job["run_info"]["run_id"], job["sinks"], job["wandb_mode"]) == ("abc", ["wandb"], "offline")
        assert last == outcome


def test_the_outcome_arrives_although_another_process_keeps_the_pipe_open(tmp_path, use_command, capsys):
    use_command(sys.executable, "-c", "import sys; sys.stdin.readline(), sys.stdin.readline()")
    sidecar = make_sidecar(tmp_path, f"wandb.finish_timeout_s={LIMIT_S}")
    sidecar.launch()
    sidecar.start({"complete": False})
    kept_open = os.dup(sidecar.process.stdin.fileno())
    try:
        sidecar.close()
    finally:
        os.close(kept_open)
    assert capsys.readouterr().err == ""


def test_a_process_that_does_not_end_is_killed(tmp_path, use_command, capsys):
    use_command("sleep", "600")
    sidecar = make_sidecar(tmp_path, "wandb.finish_timeout_s=30", seconds_left=2.25)  # 2 s are kept for the exit
    sidecar.launch()
    sidecar.start({"complete": False})
    process = sidecar.process
    started = time.monotonic()
    sidecar.close()
    assert time.monotonic() - started < 20  # of 600
    assert process.returncode == -9
    warning = capsys.readouterr().err
    assert "was not done within 0.25 s (a stop was requested); nothing is lost" in warning
    assert f"python -m distlenet.report {tmp_path} --replay-wandb" in warning


def test_no_time_to_wait_is_a_timeout(tmp_path, use_command, capsys):
    use_command("sleep", "600")
    sidecar = make_sidecar(tmp_path, "wandb.finish_timeout_s=0")
    sidecar.launch()
    sidecar.start({"complete": False})
    sidecar.close()
    assert "was not done within 0 s (wandb.finish_timeout_s)" in capsys.readouterr().err


def test_a_process_that_failed_is_a_warning(tmp_path, use_command, capsys):
    use_command("false")
    sidecar = make_sidecar(tmp_path)
    sidecar.launch()
    sidecar.process.wait()
    sidecar.start({"complete": False})
    sidecar.close()
    assert "the process that sends the records ended with status 1; nothing is lost" in capsys.readouterr().err


def test_the_tail_yields_each_complete_line_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"a":')
    tail = JsonlTail(path)
    assert list(tail.new_records()) == [{"a": 1}]
    with path.open("a") as file:
        file.write(' 2}\n{"a": 3}\n')
    assert list(tail.new_records()) == [{"a": 2}, {"a": 3}]
    assert list(tail.new_records()) == []


class RecordingSink:
    def __init__(self, fails_at=None):
        self.calls, self.end, self.fails_at = [], None, fails_at

    def put(self, record):
        if record["step"] == self.fails_at:
            raise ConnectionError("gone\nfor good")
        self.calls.append(record["step"])

    def flush(self):
        pass

    def mark_replayed(self):
        self.calls.append("replayed")

    def finish(self, outcome, summary, details):
        self.end = (outcome, summary, details)


def test_a_sink_that_fails_is_dropped_and_the_others_get_everything(tmp_path, capsys):
    good, bad = RecordingSink(), RecordingSink(fails_at=2)
    sinks = {"wandb": bad, "tensorboard": good}
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')

    def training():
        with path.open("a") as file:
            file.write('{"step": 2}\n{"step": 3}\n')
        yield "running"
        with path.open("a") as file:
            file.write('{"step": 4}\n')
        (tmp_path / "summary.json").write_text('{"steps": 4}')
        yield "finished"

    send(tmp_path, sinks, training())
    assert sinks == {"tensorboard": good}
    assert good.calls == [1, "replayed", 2, 3, 4]
    assert good.end == ("finished", {"steps": 4}, {})
    assert (bad.calls, bad.end) == ([1, "replayed"], None)
    assert capsys.readouterr().err.count("W&B: ConnectionError: gone for good; nothing more is sent there now") == 1


def test_a_sink_that_cannot_be_created_is_dropped(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("not a directory")
    job = {"sinks": ["wandb", "tensorboard"], "config": {}, "run_info": {}, "wandb_mode": "offline"}
    assert make_sinks(tmp_path, job) == {}
    warnings = capsys.readouterr().err.splitlines()
    assert [re.sub("Error.*;", "Error;", line) for line in warnings] == [
        "distlenet: W&B: KeyError; python -m distlenet.report RUN --replay-wandb sends the rest",
        "distlenet: TensorBoard: FileExistsError; a later start of the run sends the rest, unless it is complete",
    ]


def test_a_run_without_an_outcome_has_failed(tmp_path):
    sink = RecordingSink()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "summary.json").write_text("{}")  # of an earlier, longer run
    send(tmp_path, {"wandb": sink}, iter(["running"]))
    assert sink.end == ("failed", {}, {})


@pytest.fixture
def exits(monkeypatch):
    """The statuses with which the sender would exit."""
    statuses = []
    monkeypatch.setattr(sender.os, "_exit", statuses.append)
    monkeypatch.setattr(sender, "set_session_share", lambda _: None)
    monkeypatch.setattr(sender, "EXIT_S", 0.0)
    return statuses


def job_line(finish_timeout_s=600):
    return json.dumps({"config": {"wandb": {"finish_timeout_s": finish_timeout_s}}})


@pytest.mark.parametrize(
    ("lines", "outcome"), [(["finished\n"], "finished"), (["preempted\n"], "preempted"), ([], "failed")]
)
def test_job_and_outcome_are_received(exits, lines, outcome):
    job, end = Future(), Future()
    receive(iter([job_line(), *lines]), job, end)
    assert job.result()["config"]
    assert end.result() == outcome
    assert not exits


def test_the_sender_exits_if_the_training_ends_before_its_start(monkeypatch):
    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(sender.os, "_exit", leave)
    with pytest.raises(SystemExit, match="0"):
        receive(iter([]), Future(), Future())


def test_the_sender_exits_if_sending_takes_too_long_after_the_end(exits):
    receive(iter([job_line(0.05)]), Future(), Future())
    deadline = time.monotonic() + 30
    while not exits and time.monotonic() < deadline:
        time.sleep(0.01)
    assert exits == [1]


def test_statuses_end_with_the_outcome(monkeypatch):
    monkeypatch.setattr(sender, "POLL_S", 0.01)
    outcome: Future[str] = Future()
    polls = statuses(outcome)
    assert [next(polls), next(polls)] == ["running", "running"]
    threading.Timer(0.05, outcome.set_result, ("finished",)).start()
    assert {*polls} - {"running"} == {"finished"}


def test_the_priority_of_this_process_is_lowered_even_if_others_are_hidden():
    """As with /proc mounted with hidepid. In a separate process, since it cannot be undone."""
    program = (
        "import os, psutil\n"
        "from distlenet.tracking.priority import lower_priority, process_tree, set_session_share\n"
        "def hidden(*_, **__):\n"
        "    raise psutil.AccessDenied(1)\n"
        "psutil.Process.children = hidden\n"
        "lower_priority()\n"
        "set_session_share(19)\n"
        "assert [process.pid for process in process_tree(os.getpid())] == [os.getpid()]\n"
        "assert os.sched_getscheduler(0) == os.SCHED_IDLE\n"
    )
    run_command(sys.executable, "-c", program).succeeded()


def test_threads_and_child_sessions_have_the_lowest_priority():
    """In a separate process, with a thread, and a child in another session like W&B's process."""
    program = (
        "import os, subprocess, sys, threading\n"
        "from distlenet.tracking.priority import lower_priority, set_session_share\n"
        "lower_priority()\n"
        "child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE, start_new_session=True)\n"
        "stop = threading.Event()\n"
        "thread = threading.Thread(target=stop.wait, daemon=True)\n"
        "thread.start()\n"
        "for process in (os.getpid(), thread.native_id, child.pid):\n"
        "    assert os.sched_getscheduler(process) == os.SCHED_IDLE, process\n"
        "def nice(process):\n"
        "    path = f'/proc/{process}/autogroup'\n"
        "    text = open(path).read() if os.path.exists(path) else ''\n"
        "    return int(text.split()[-1]) if text else None\n"
        "own = nice(os.getpid())\n"
        "for share in (19, 0):\n"
        "    set_session_share(share)\n"
        "    assert nice(child.pid) in (share, None)\n"
        "    assert nice(os.getpid()) == own\n"
        "stop.set()\n"
        "child.communicate(b'\\n')\n"
    )
    run_command(sys.executable, "-c", program).succeeded()


def test_a_process_that_has_ended_has_no_tree():
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert process_tree(process.pid) == []
    assert process_tree(os.getpid())[0].pid == os.getpid()


def test_ctrl_c_during_the_wait_ends_the_process_and_is_not_replaced(tmp_path, use_command, monkeypatch):
    use_command("sleep", "60")
    sidecar = make_sidecar(tmp_path)
    sidecar.launch()
    sidecar.start({"complete": False})
    process = sidecar.process

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(process, "communicate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sidecar.close()
    assert process.poll() is not None
    sidecar.close()  # again, as the exit stack of a training does
