"""Ranks that are forked from the fork server; test_survival.py has whole jobs of them."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import LIMIT_S, clean_environment, run_command
from torch.distributed.elastic.multiprocessing import api

from distlenet.launch.fork_server import wait_for_request
from distlenet.launch.forked_rank import split_numactl, use_fork_server
from distlenet.launch.warm_start import ForkedRank, ForkServer

pytestmark = pytest.mark.ranks

Start = Callable[..., ForkedRank]

STATE = """
import json, os, signal, sys
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
names = ("Threads", "SigBlk", "SigIgn", "SigCgt", "SigPnd", "ShdPnd")
print(json.dumps({
    "parent": os.getppid(),
    "is session leader": os.getsid(0) == os.getpid(),
    "signals": {name: status[name].strip() for name in names},
    "handlers": {number: str(signal.getsignal(number)) for number in sorted(signal.valid_signals())},
    "open files": len(os.listdir("/proc/self/fd")),
    "CPUs": sorted(os.sched_getaffinity(0)),
    "directory": os.getcwd(),
    "environment": dict(os.environ),
    "argv": sys.argv,
    "path": sys.path,
    "main": [sys.modules["__main__"].__file__, __name__],
    "unbuffered": sys.stdout.write_through,
}))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in clean_environment().items():  # some variables concern the start of an interpreter
            patch.setenv(name, value)
        server = ForkServer()
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture
def output(tmp_path) -> Path:
    path = tmp_path / "output"
    path.touch()
    return path


@pytest.fixture
def start(server, output) -> Start:
    def start(*words: object, env: dict[str, str] | None = None, cpus: tuple[int, ...] = ()) -> ForkedRank:
        arguments = tuple(str(word) for word in words)
        rank = server.fork((arguments, env or dict(os.environ), (str(output), str(output)), set(cpus)))
        assert rank is not None
        return rank

    return start


def test_a_rank_is_as_in_a_new_interpreter(start, output, tmp_path):
    script = tmp_path / "state.py"
    script.write_text(STATE)
    env = clean_environment({"RANK": "1", "NEW": "x"})
    cpu = min(os.sched_getaffinity(0))
    with (tmp_path / "cold").open("w") as file:
        subprocess.run(
            [sys.executable, "-u", script, "a b"],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {cpu}),
            check=True,
        )
    assert start(script, "a b", env=env, cpus=(cpu,)).wait(LIMIT_S) == 0, output.read_text()
    warm, cold = (json.loads(path.read_text()) for path in (output, tmp_path / "cold"))
    assert warm == cold


def test_there_is_no_gpu_context(start, output, tmp_path):
    script = tmp_path / "cuda.py"
    script.write_text(
        "import sys; assert 'torch._dynamo' in sys.modules and 'distlenet.train' in sys.modules\n"
        "import torch, os; print(torch.cuda.is_initialized(), torch.cuda._is_in_bad_fork())"
    )
    assert start(script).wait(LIMIT_S) == 0, output.read_text()
    assert output.read_text() == "False False\n"


def test_a_rank_dies_with_its_agent(start, output, tmp_path):
    script = tmp_path / "death.py"
    script.write_text(
        "import ctypes; number = ctypes.c_int()\n"
        "ctypes.CDLL(None).prctl(2, ctypes.byref(number)); print(number.value)"  # PR_GET_PDEATHSIG
    )
    assert start(script).wait(LIMIT_S) == 0, output.read_text()
    assert output.read_text() == f"{signal.SIGKILL.value}\n"


@pytest.mark.parametrize(
    ("end", "status", "text"),
    [
        ("sys.exit()", 0, "out handler "),
        ("sys.exit(75)", 75, "out handler "),
        ("sys.exit('a reason')", 1, "out a reason\nhandler "),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\nhandler "),
        ("os.kill(os.getpid(), 9)", -9, "out "),
    ],
)
def test_exit_status_and_handlers(start, output, tmp_path, end, status, text):
    script = tmp_path / "exit.py"
    script.write_text(
        "import atexit, os, sys\natexit.register(print, 'handler', end=' ')\n"
        f"print('out', end=' ')\nsys.stdout.flush()\n{end}\n"
    )
    assert start(script).wait() == status  # older torch gives no timeout
    assert output.read_text().endswith(text)


def test_a_module_runs_as_main(start, output):
    """Without the warning of runpy that the module has been imported."""
    assert start("-m", "distlenet.train", "optim.lrr=1").wait(LIMIT_S) == 2
    assert output.read_text() == "distlenet: optim.lrr=1: unknown key 'optim.lrr'; did you mean optim.lr?\n"


def test_ranks_differ_in_random_numbers(start, output, tmp_path):
    script = tmp_path / "draw.py"
    script.write_text("import numpy, random, uuid; print(numpy.random.rand(), random.random(), uuid.uuid4())")
    for _ in range(2):
        assert start(script).wait(LIMIT_S) == 0
    first, second = (line.split() for line in output.read_text().splitlines())
    assert all(a != b for a, b in zip(first, second, strict=True))


NO_WARM_START = (
    "distlenet: no warm start: the fork server {}; ranks start in new interpreters; "
    "DISTLENET_WARM_START=0 avoids the wait\n"
)


def test_a_server_that_cannot_fork_is_not_started_again(monkeypatch, capsys):
    monkeypatch.setattr("distlenet.launch.warm_start.MODULE", "this")  # exits at once
    server = ForkServer()
    first = server.process
    for _ in range(2):
        assert server.fork(((), {}, (None, None), set())) is None
    assert server.process is first
    assert capsys.readouterr().err == NO_WARM_START.format("has ended")


def test_a_server_that_does_not_respond_is_ended(monkeypatch, capsys):
    server = ForkServer()
    server.process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr("distlenet.launch.warm_start.TIMEOUT_S", 0.01)
    assert server.fork(((), {}, (None, None), set())) is None
    assert server.process.returncode == -signal.SIGKILL
    assert capsys.readouterr().err == NO_WARM_START.format("did not respond in 0.01 s")


def test_another_version_of_torchrun_starts_new_interpreters(monkeypatch, capsys):
    monkeypatch.delattr("torch.distributed.elastic.multiprocessing.api.get_subprocess_handler")
    server = ForkServer()
    use_fork_server(server)
    assert server.process.returncode == -signal.SIGKILL
    assert capsys.readouterr().err == (
        "distlenet: no warm start: this version of torch starts ranks in another way; they start in new interpreters\n"
    )
    assert not hasattr(api, "get_subprocess_handler")


def test_a_server_whose_agent_has_gone_ends_without_a_message():
    agent_end, server_end = multiprocessing.Pipe()
    server_end.send("not received: the next call fails, as the connection is reset")
    agent_end.close()
    with pytest.raises(SystemExit) as ended:
        wait_for_request(server_end)
    assert ended.value.code == 0


SAFETY = """
import threading
from distlenet.launch.fork_server import unsafe_to_fork

files, ended = {0, 1, 2}, threading.Event()
thread = threading.Thread(target=ended.wait)
thread.start()
print(unsafe_to_fork(files))
ended.set()
thread.join()
print(unsafe_to_fork(files) or "safe")
with open("/dev/null"):
    print(unsafe_to_fork(files))
"""


def test_a_process_with_threads_or_files_forks_no_ranks():
    """In a new interpreter: that of the tests may have threads."""
    ended = run_command(sys.executable, "-c", SAFETY).succeeded()
    assert ended.stdout.splitlines() == ["there are 2 threads", "safe", "files are open: /dev/null"]


@pytest.mark.parametrize(
    ("words", "cpus", "command"),
    [
        (("numactl", "--physcpubind=0-2,8", "python", "-u"), {0, 1, 2, 8}, ("python", "-u")),
        (("python", "-u", "x"), set(), ("python", "-u", "x")),
        (("./program",), set(), ("./program",)),
    ],
)
def test_cpus_of_numactl(words, cpus, command):
    assert split_numactl(words) == (cpus, command)
