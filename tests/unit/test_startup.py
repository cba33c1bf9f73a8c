"""Stop requests before the first step."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import LIMIT_S, REPO, clean_environment, run_command

from distlenet.prove.processes import free_port
from distlenet.utils.startup import announce_start

pytestmark = pytest.mark.unit


def wait_until(condition, process):
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def handles(process, number):
    """Return whether the process handles a signal, from the mask in /proc: bit n - 1 stands for signal n."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(mask >> (number - 1) & 1)


def has_socket(process):
    """Return whether the process has opened a socket; its standard streams may be sockets of this process."""
    with contextlib.suppress(FileNotFoundError):  # closed meanwhile
        files = [file for file in Path(f"/proc/{process.pid}/fd").iterdir() if int(file.name) > 2]
        return any("socket" in os.readlink(file) for file in files)
    return False


@pytest.mark.usefixtures("python_handles_ctrl_c")
@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGINT), (1, signal.SIGUSR2)])
def test_a_rank_that_waits_for_others_ends_with_one_line(tmp_path, rank, number):
    """The main thread waits in C++ for the rank that never starts: a handler of Python alone would not run."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    env = clean_environment({name: str(value) for name, value in (ranks | address).items()})
    command = [sys.executable, "-m", "distlenet.train", "data.name=digits", "device=cpu", "wandb.mode=disabled"]
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: handles(process, number), process)
            if rank == 0:
                wait_until(lambda: has_socket(process), process)  # of its store: it waits for the other rank
            process.send_signal(number)
            _, error = process.communicate(timeout=LIMIT_S)
        finally:
            process.kill()
    assert process.returncode == (130 if number == signal.SIGINT else 75)
    line = "distlenet: stopped by SIGINT (Ctrl-C) before the first step; the same command starts again\n"
    assert error == (line if rank == 0 else "")


@pytest.mark.usefixtures("python_handles_ctrl_c")
@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "SIGINT (Ctrl-C)"), (signal.SIGTERM, "SIGTERM")])
def test_an_agent_that_waits_for_other_nodes_ends_and_leaves_no_directory(tmp_path, number, name):
    """Its main thread waits in C++, and torchrun has installed no handlers."""
    node = ("--nnodes=2", "--node-rank=0", "--master-addr=127.0.0.1", f"--master-port={free_port()}")
    command = [sys.executable, "-m", "distlenet.launch", *node, "-m", "distlenet.train"]
    env = clean_environment({"TMPDIR": str(tmp_path), "DISTLENET_WARM_START": "0"})
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: any(tmp_path.glob("distlenet-agent-*")) and has_socket(process), process)
            process.send_signal(number)
            _, error = process.communicate(timeout=LIMIT_S)
        finally:
            process.kill()
    assert (process.returncode, error) == (128 + number, f"distlenet: stopped by {name}\n")
    assert not list(tmp_path.glob("distlenet-*"))


PROGRAM = """
import os, signal, sys
from distlenet.distributed.preemption import Preemption
from distlenet.utils.startup import exit_on_stop_request

exit_on_stop_request()
reading, writing = os.pipe()
if (child := os.fork()) == 0:
    os.write(writing, b"ready")
    while True:
        signal.pause()
os.read(reading, 5)
os.kill(child, signal.SIGTERM)
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
preemption = Preemption(25)
preemption.install()
os.kill(os.getpid(), signal.SIGTERM)
print(preemption.requested_by, flush=True)
preemption.close()
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_child_and_a_run_that_trains_are_not_ended(tmp_path):
    """After the training, the signal has its default action."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert (ended.stdout, ended.returncode) == ("child -15\nSIGTERM\n", -signal.SIGTERM), ended.stderr


SECOND = """
import os, signal, time
from distlenet.distributed.preemption import Preemption
from distlenet.utils import startup

startup.REPEAT_S = -1.0  # the next signal is a second Ctrl-C
startup.exit_on_stop_request()
preemption = Preemption(25)
preemption.install()
os.kill(os.getpid(), signal.SIGINT)
while not preemption.stop_requested:
    pass
# This thread waits in C, as in a collective, when the second signal arrives; the child exits with this process.
os.system("kill -TERM $PPID; exec tail -s 0.1 --pid=$PPID -f /dev/null > /dev/null 2>&1")
"""


@pytest.mark.usefixtures("python_handles_ctrl_c")
def test_a_second_ctrl_c_ends_a_process_whose_main_thread_waits(tmp_path):
    env = {"TORCHELASTIC_RUN_ID": "1"}
    ended = run_command(sys.executable, "-c", SECOND, cwd=tmp_path, env=env)
    assert ended.status == 130, str(ended)
    *_, line = ended.stderr.splitlines()
    assert line == "distlenet: ended by a second Ctrl-C, without a save"


def test_after_an_error_of_another_rank_the_end_is_silent(tmp_path):
    """torchrun then ends this rank, which may still be importing, by SIGTERM."""
    files = [tmp_path / f"{rank}/error.json" for rank in (0, 1)]
    for file in files:
        file.parent.mkdir()
    program = "from distlenet.utils.startup import *\nexit_on_stop_request()\nos.kill(os.getpid(), signal.SIGTERM)\n"
    program += "while True:\n    signal.pause()"
    for lines in (1, 0):
        words, env = (sys.executable, "-c", program), {"TORCHELASTIC_ERROR_FILE": str(files[0])}
        ended = run_command(*words, env=env)
        assert (ended.status, ended.stderr.count("\n")) == (75, lines), str(ended)
        files[1].touch()


@pytest.mark.usefixtures("python_handles_ctrl_c")
@pytest.mark.parametrize("module", ["distlenet.evaluate", "distlenet.predict", "distlenet.report"])
def test_ctrl_c_while_a_command_imports_is_one_line(tmp_path, module):
    """A module that each of them imports presses it."""
    (tmp_path / "argparse.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    ended = run_command(sys.executable, "-m", module, cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}:{REPO}"})
    assert (ended.status, ended.stderr) == (130, "distlenet: stopped by SIGINT (Ctrl-C)\n"), str(ended)


@pytest.mark.parametrize(("rank", "is_terminal", "lines"), [("0", True, 1), ("1", True, 0), ("0", False, 0)])
def test_a_terminal_shows_the_start_once(monkeypatch, capsys, rank, is_terminal, lines):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    announce_start()
    assert capsys.readouterr().out.count("distlenet is starting: ") == lines
