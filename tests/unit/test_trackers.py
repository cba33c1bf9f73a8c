"""W&B's settings, its rows, TensorBoard, and the process that sends to both."""

import json
import math
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import run_command

from distlenet.config.loading import load_config
from distlenet.tracking.sender import JsonlTail, Sinks, listen, send
from distlenet.tracking.sidecar import Sidecar
from distlenet.tracking.tensorboard import TensorBoard
from distlenet.tracking.wandb import base_url, has_key, row, row_number, wandb_mode
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

RECORD = {"split": "train", "step": 50, "epoch": 2, "batch": 3, "loss": 0.25, "accuracy": None, "slowest_host": "n1"}


def test_auto_follows_the_environment_then_the_key(tmp_path):
    home = {"HOME": str(tmp_path)}
    assert wandb_mode("auto", home) == "offline"
    assert wandb_mode("auto", {**home, "WANDB_API_KEY": "x"}) == "online"
    assert wandb_mode("auto", {**home, "WANDB_API_KEY": "x", "WANDB_MODE": "disabled"}) == "disabled"
    assert wandb_mode("online", {**home, "WANDB_MODE": "disabled"}) == "online"


def test_a_key_in_a_netrc_is_one_for_its_host_alone(tmp_path):
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert has_key({"HOME": str(tmp_path)})
    assert not has_key({"HOME": str(tmp_path), "WANDB_BASE_URL": "https://wandb.example.org"})
    (tmp_path / ".netrc").write_text("machine\n")  # torn
    assert not has_key({"HOME": str(tmp_path)})


def test_rows_are_numbered_by_step_and_kind():
    splits = ("train", "train_epoch", "test")
    numbers = [row_number({"step": step, "split": split}) for step in (0, 1, 2) for split in splits]
    assert numbers == [0, 1, 2, 4, 5, 6, 8, 9, 10]


def test_a_row_names_the_split_and_leaves_out_what_is_null():
    expected = {"step": 50, "epoch": 2, "train/batch": 3, "train/loss": 0.25, "train/slowest_host": "n1"}
    assert row(RECORD) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["wandb.mode=online"], r"package wandb: is not installed; pip install wandb, or give wandb\.mode=disabled"),
        (["wandb.mode=disabled", "tracking.tensorboard=true"], r"package tensorboard: .*tracking\.tensorboard=false"),
    ],
)
def test_a_missing_package_is_told_before_training(tmp_path, monkeypatch, settings, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=message):
        Sidecar(tmp_path, load_config([], settings).to_dict(), lambda: 1.0)


def test_nothing_is_started_where_nothing_is_wanted(tmp_path):
    sidecar = Sidecar(tmp_path, load_config([], ["wandb.mode=disabled"]).to_dict(), lambda: 1.0)
    sidecar.launch()
    sidecar.start({"complete": False})
    assert sidecar.process is None
    sidecar.log(RECORD)
    sidecar.close()


@pytest.mark.parametrize("complete", [True, None])
def test_one_that_is_told_nothing_ends_at_once(tmp_path, complete):
    """Of a run that is complete there is nothing to send; and a training may fail before it has begun."""
    sidecar = Sidecar(tmp_path, load_config([], ["wandb.mode=offline"]).to_dict(), lambda: math.inf)
    sidecar.launch()
    process = sidecar.process
    if complete:
        sidecar.start({"complete": True})
    sidecar.close()
    assert process.returncode == -9
    assert not (tmp_path / "wandb").exists()


def test_one_whose_training_is_gone_before_it_began_ends_by_itself(tmp_path):
    ended = run_command(sys.executable, "-c", LEAVES, tmp_path).succeeded()
    assert ended.stdout == "left 0\n"
    assert ended.stderr == ""


LEAVES = """
import math, os, sys
from pathlib import Path
from distlenet.config.loading import load_config
from distlenet.tracking.sidecar import Sidecar
sidecar = Sidecar(Path(sys.argv[1]), load_config([], ["wandb.mode=offline"]).to_dict(), lambda: math.inf)
sidecar.launch()
sidecar.process.stdin.close()
print("left", sidecar.process.wait(60))
"""


def test_the_tail_gives_whole_lines_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"a":')
    tail = JsonlTail(path)
    assert list(tail.more()) == [{"a": 1}]
    with path.open("a") as file:
        file.write(' 2}\n{"a": 3}\n')
    assert list(tail.more()) == [{"a": 2}, {"a": 3}]
    assert list(tail.more()) == []


class Kept:
    def __init__(self, fails_at=None):
        self.records, self.ended, self.fails_at = [], None, fails_at

    def put(self, record):
        if record["step"] == self.fails_at:
            raise ConnectionError("gone\nfor good")
        self.records.append(record["step"])

    def mark_replayed(self):
        self.records.append("caught up")

    def finish(self, outcome, summary, details):
        self.ended = (outcome, summary, details)


def test_what_fails_is_left_out_and_the_others_have_everything(tmp_path, capsys):
    good, bad = Kept(), Kept(fails_at=2)
    sinks = Sinks({"wandb": lambda: bad, "good": lambda: good})
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')

    def told():
        with path.open("a") as file:
            file.write('{"step": 2}\n{"step": 3}\n')
        yield "more"
        with path.open("a") as file:
            file.write('{"step": 4}\n')
        (tmp_path / "summary.json").write_text('{"steps": 4}')
        yield "finished"

    send(tmp_path, sinks, told())
    assert good.records == [1, "caught up", 2, 3, 4]
    assert good.ended == ("finished", {"steps": 4}, None)
    assert (bad.records, bad.ended) == ([1, "caught up"], None)
    assert capsys.readouterr().err.count("W&B: ConnectionError: gone for good; nothing more is sent there") == 1


def test_a_training_that_is_gone_has_failed(tmp_path):
    kept = Kept()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "summary.json").write_text("{}")  # of an earlier, longer run
    send(tmp_path, Sinks({"kept": lambda: kept}), iter(["more"]))
    assert kept.ended == ("failed", {}, None)


def test_tensorboard_has_the_last_starts_numbers_once(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for losses in ([0.5, 0.4, 0.3], [0.5, 0.45]):
        board = TensorBoard(tmp_path)
        for step, loss in enumerate(losses):
            board.put({"split": "train", "step": step, "time": 100.0 + step, "loss": loss, "slowest_host": "n1"})
        board.mark_replayed()
        board.finish("finished", {}, None)
    seen = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    seen.Reload()
    assert seen.Tags()["tensors"] == ["train/loss"]
    events = seen.Tensors("train/loss")
    assert [(event.step, event.wall_time) for event in events] == [(0, 100.0), (1, 101.0)]
    assert [event.tensor_proto.float_val[0] for event in events] == pytest.approx([0.5, 0.45])


def test_one_that_does_not_end_is_ended(tmp_path, monkeypatch, capsys):
    (tmp_path / "metrics.jsonl").write_text("")
    config = load_config([], ["wandb.mode=offline", "wandb.finish_timeout_s=30"]).to_dict()
    sidecar = Sidecar(tmp_path, config, lambda: 2.25)  # the job was asked to stop: 2 s are kept for leaving
    real = __import__("subprocess").Popen
    sleeper = ["sleep", "600"]
    monkeypatch.setattr("distlenet.tracking.sidecar.subprocess.Popen", lambda _, **more: real(sleeper, **more))
    sidecar.launch()
    sidecar.start({"complete": False})
    process = sidecar.process
    for _ in range(3):
        sidecar.log(RECORD)
    started = time.monotonic()
    sidecar.close()
    assert time.monotonic() - started < 20  # of 600
    assert process.returncode == -9
    assert "--replay-wandb" in capsys.readouterr().err


def test_a_full_pipe_does_not_stop_the_training(tmp_path, monkeypatch, capsys):
    config = load_config([], ["wandb.mode=offline", "wandb.finish_timeout_s=0"]).to_dict()
    sidecar = Sidecar(tmp_path, config, lambda: 25.0)
    real = __import__("subprocess").Popen
    monkeypatch.setattr("distlenet.tracking.sidecar.subprocess.Popen", lambda _, **more: real(["sleep", "600"], **more))
    sidecar.launch()
    sidecar.start({"complete": False})
    for _ in range(100_000):  # 500 kB: more than a pipe holds
        sidecar.log(RECORD)
    sidecar.close()
    assert "was not done within 0 s (wandb.finish_timeout_s)" in capsys.readouterr().err


def test_what_is_told_is_taken_at_once_and_the_end_is_heard_while_nobody_asks():
    """A thread that says 100,000 lines to nobody, and the last word; W&B does not answer meanwhile."""
    ended, calls = threading.Event(), []
    said = iter(["start", *["more"] * 100_000, "finished", "beyond"])
    heard = listen(said, lambda: calls.append("at start"), lambda first: (calls.append(first), ended.set()))
    assert ended.wait(30)
    assert calls == ["at start", "start"]
    heard = list(heard)
    assert (heard[:2], heard[-2:]) == (["start", "more"], ["more", "finished"])


def test_a_training_that_is_gone_is_an_end_too():
    ended = []
    assert list(listen(iter(["start", "more"]), lambda: None, ended.append)) == ["start", "more"]
    assert ended == ["start"]


def test_a_training_that_is_gone_before_its_start_has_only_an_end():
    calls = []
    assert list(listen(iter([]), lambda: calls.append("at start"), calls.append)) == []
    assert calls == [""]


def test_what_fails_at_the_start_leaves_nobody_waiting(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    assert list(listen(iter(["start", "more"]), lambda: 1 / 0, lambda _: None)) == ["start"]


def test_where_other_processes_cannot_be_seen_this_one_stands_back(monkeypatch):
    """As with /proc mounted with hidepid; in a process of its own, for it does not come back."""
    program = (
        "import os, psutil\n"
        "from distlenet.tracking.priority import lower_priority\n"
        "def hidden(*_, **__):\n"
        "    raise psutil.AccessDenied(1)\n"
        "psutil.Process.children = hidden\n"
        "lower_priority()\n"
        "assert os.sched_getscheduler(0) == os.SCHED_IDLE\n"
    )
    run_command(sys.executable, "-c", program).succeeded()


def test_who_hears_start_and_end_while_it_gets_ready_does_not_stand_back_again(tmp_path):
    """There is no rank any more to leave a processor to; in a process of its own, since it ignores signals."""
    program = (
        "import io, json, sys, threading\n"
        "from distlenet.tracking import sender\n"
        "calls = []\n"
        "sender.lower_priority = lambda: calls.append('back')\n"
        "sender.set_session_share = calls.append\n"
        "def get_ready(_):\n"
        "    for thread in threading.enumerate():\n"
        "        if thread is not threading.main_thread() and not isinstance(thread, threading.Timer):\n"
        "            thread.join()\n"
        "sender.get_ready, sender.make_sinks, sender.send = get_ready, lambda *_: None, lambda *_: print(calls)\n"
        "start = json.dumps({'config': {'wandb': {'finish_timeout_s': 60}}})\n"
        "sys.stdin = io.StringIO(f'{start}\\nfinished\\n')\n"
        "sys.argv[1:] = [sys.argv[1], 'wandb']\n"
        "sender.main()\n"
    )
    assert run_command(sys.executable, "-c", program, tmp_path).succeeded().stdout == "['back', 0]\n"


def test_who_stands_back_has_the_least_share():
    """A process of its own: it, a thread and a child in a context of its own, as W&B's."""
    program = (
        "import os, subprocess, sys, threading\n"
        "from distlenet.tracking.priority import set_session_share, lower_priority\n"
        "child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE, start_new_session=True)\n"
        "go = threading.Event()\n"
        "thread = threading.Thread(target=go.wait, daemon=True)\n"
        "thread.start()\n"
        "lower_priority()\n"
        "for process in (os.getpid(), thread.native_id, child.pid):\n"
        "    assert os.sched_getscheduler(process) == os.SCHED_IDLE, process\n"
        "def is_of(nice):\n"
        "    for process in (os.getpid(), child.pid):\n"
        "        path = f'/proc/{process}/autogroup'\n"
        "        said = open(path).read() if os.path.exists(path) else ''\n"
        "        assert not said or said.endswith(f'nice {nice}\\n'), (process, said)\n"
        "is_of(19)\n"
        "set_session_share(0)\n"
        "is_of(0)\n"
        "go.set()\n"
        "child.communicate(b'\\n')\n"
    )
    run_command(sys.executable, "-c", program).succeeded()


def test_the_start_says_all_that_is_needed(tmp_path, monkeypatch):
    said = []
    process = SimpleNamespace(
        stdin=SimpleNamespace(fileno=lambda: 0, close=lambda: None), pid=0, wait=lambda _: 0, poll=lambda: 0
    )
    monkeypatch.setattr("distlenet.tracking.sidecar.subprocess.Popen", lambda *_, **more: said.append(more) or process)
    monkeypatch.setattr("distlenet.tracking.sidecar.os.set_blocking", lambda *_: None)
    monkeypatch.setattr("distlenet.tracking.sidecar.os.write", lambda _, line: said.append(line))
    sidecar = Sidecar(tmp_path, load_config([], ["wandb.mode=offline"]).to_dict(), lambda: 25.0)
    sidecar.launch()
    sidecar.start({"complete": False, "run_id": "abc"})
    start = json.loads(said[1])
    assert (start["run_info"]["run_id"], start["sinks"], start["wandb_mode"]) == ("abc", ["wandb"], "offline")
    sidecar.finish({})
    sidecar.close()
    assert said[-1] == b"finished\n"


def test_one_that_is_killed_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "metrics.jsonl").write_text("")
    config = load_config([], ["wandb.mode=offline"]).to_dict()
    sidecar = Sidecar(tmp_path, config, lambda: math.inf)
    real = __import__("subprocess").Popen
    monkeypatch.setattr("distlenet.tracking.sidecar.subprocess.Popen", lambda _, **more: real(["false"], **more))
    sidecar.launch()
    sidecar.start({"complete": False})
    sidecar.close()
    assert "what sends the records ended with status 1; nothing is lost" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "mode"),
    [("dryrun", "offline"), ("Disabled", "disabled"), ("ONLINE", "online"), ("run", "online"), ("", "online")],
)
def test_what_wandb_mode_means(said, mode):
    assert wandb_mode("auto", {"WANDB_MODE": said, "WANDB_API_KEY": "x" * 40}) == mode


def test_a_wandb_mode_that_means_nothing_is_refused():
    with pytest.raises(UserError, match="WANDB_MODE=shared: expected online, offline or disabled"):
        wandb_mode("auto", {"WANDB_MODE": "shared"})


def test_odd_places_of_keys_are_no_key(tmp_path, monkeypatch):
    (tmp_path / ".netrc").write_bytes(b"machine \xff login x password y\n")
    assert not has_key({"HOME": str(tmp_path)})
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password " + "k" * 40 + "\n")
    assert has_key({"HOME": str(tmp_path)})
    assert not has_key({"HOME": str(tmp_path), "WANDB_BASE_URL": "http://[::1"})
    (tmp_path / ".config/wandb").mkdir(parents=True)
    (tmp_path / ".config/wandb/settings").write_text("[default]\nbase_url = https://wandb.example\n")
    assert not has_key({"HOME": str(tmp_path)})  # wandb login --host: the key of api.wandb.ai is not for it
    assert base_url({"HOME": str(tmp_path), "WANDB_BASE_URL": "http://here"}) == "http://here"
    (tmp_path / ".netrc").write_text("machine wandb.example login user password " + "k" * 40 + "\n")
    assert has_key({"HOME": str(tmp_path)})
    (tmp_path / ".config/wandb/settings").write_bytes(b"no ini file \xff")
    assert base_url({"HOME": str(tmp_path)}) == "https://api.wandb.ai"
    monkeypatch.setattr(Path, "expanduser", lambda _: (_ for _ in ()).throw(RuntimeError("no home")))
    assert not has_key({})
