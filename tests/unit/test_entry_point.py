"""Exit status and messages of the commands: each user error is status 2 and one line."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import LIMIT_S, clean_environment, run_command
from filelock import FileLock
from idx_files import small_set, write_set

from distlenet import evaluate, train
from distlenet.checkpoint.format import write_atomically
from distlenet.config.arguments import parse_arguments
from distlenet.config.loading import load_config
from distlenet.distributed.entry_point import LINGER_S, run_entry
from distlenet.models.lenet import Net
from distlenet.utils.errors import RankError, UserError

pytestmark = pytest.mark.unit


@pytest.fixture
def error_of(monkeypatch, tmp_path, fails):
    """Run a command's main with invalid arguments in an empty directory; return its error message."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)

    def check(*words: str, main=train.main) -> str:
        monkeypatch.setattr(sys, "argv", ["distlenet", *words])
        return fails(main)

    return check


DIGITS = ("data.name=digits", "device=cpu")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lrr=1"], "did you mean optim.lr?"),
        (["--config", "none.yaml"], "--config none.yaml: cannot be read: No such file or directory"),
        (["--config", "broken.yaml"], "--config broken.yaml: not valid YAML"),
        (["--epochs", "3"], "unrecognized arguments: --epochs"),
        (["data.root=truncated"], "truncated/train-images-idx3-ubyte.gz: cannot be read"),
        (["data.root=foreign"], "is not the published file"),
        (["data.root=broken.yaml"], "data.root=broken.yaml: is not a readable directory"),
        ([*DIGITS, "distributed.backend=nccl"], "distributed.backend=nccl"),
        ([*DIGITS, "precision=fp16"], "precision=fp16: needs a GPU"),
        ([*DIGITS, "train.global_batch_size=7", "train.accumulation_steps=2"], "; give 6 or 8"),
        ([*DIGITS, "checkpoint.resume=nowhere"], "checkpoint nowhere: no such file"),
        ([*DIGITS, "checkpoint.resume=other.pt"], "another architecture"),
        ([*DIGITS, "checkpoint.resume=broken.yaml"], "cannot be read: its bytes do not match"),
        ([*DIGITS, "checkpoint.resume=seed-1.pt"], "seed (was 1, now 0)"),
        ([*DIGITS, "checkpoint.path=seed-1.pt"], "checkpoint.resume"),
        ([*DIGITS, "train.max_steps=2", "optim.warmup_steps=2"], "the run has 2 steps"),
        ([*DIGITS, "run.dir=broken.yaml"], "run directory broken.yaml"),
        ([*DIGITS, "data.drop_last=true", "train.global_batch_size=4000"], "=true: drops all 1437 images"),
    ],
)
def test_training(error_of, tmp_path, words, message):
    (tmp_path / "broken.yaml").write_text("seed: [1")
    write_set(tmp_path / "truncated", small_set(), packed=True)
    path = tmp_path / "truncated/train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    write_set(tmp_path / "foreign", small_set(), packed=True)
    config = load_config([], ["data.name=digits", "seed=1"]).to_dict()
    other = Net()
    other.fc3 = torch.nn.Linear(84, 3)
    for name, net in (("seed-1.pt", Net()), ("other.pt", other)):
        write_atomically({"model": net.state_dict(), "step": 1, "epoch": 0, "config": config}, tmp_path / name)
    assert message in error_of(*words)


def train_two_steps(*more: str) -> None:
    train.train(load_config([], [*DIGITS, "train.max_steps=2", "run.name=run", *more]))


def test_a_refused_start_does_not_change_the_run(error_of, tmp_path):
    train_two_steps()

    def files():
        paths = (path for path in (tmp_path / "runs/run").rglob("*") if path.is_file())
        return {path: path.read_bytes() for path in paths if path.suffix != ".log"}  # logs record each start

    before = files()
    for change in ("seed=5", "checkpoint.resume=never", "optim.warmup_steps=2"):
        error_of(*DIGITS, "train.max_steps=2", "run.name=run", change)
    assert files() == before


def test_two_jobs_in_one_run_directory(error_of, tmp_path):
    (tmp_path / "runs/run").mkdir(parents=True)
    with FileLock(tmp_path / "runs/run/.lock"):
        assert "another job is writing there" in error_of(*DIGITS, "run.name=run")
    train_two_steps()


@pytest.mark.parametrize("key", ["optimizer", "schedule", "meter", "batch", "best", "an index"])
def test_a_checkpoint_without_the_state_of_training(error_of, tmp_path, key):
    train_two_steps()
    path = tmp_path / "runs/run/checkpoints/step-00000002.pt"
    state = torch.load(path, weights_only=True)
    if key == "an index":
        state["optimizer"]["param_groups"][0]["params"][0] = torch.zeros(1)  # compares equal to the index 0
    else:
        del state[key]
    write_atomically(state, path)
    message = error_of(*DIGITS, "train.max_steps=2", f"checkpoint.resume={path}", "run.name=other")
    expected = "optimizer.param_groups are of the parameters" if key == "an index" else "no state from which training"
    assert expected in message


def test_a_run_stopped_by_max_steps_resumes_within_the_epoch(error_of, tmp_path):
    """An epoch has one record, which counts all its samples."""
    constant = ("optim.schedule=constant", "optim.lr=0.01", "checkpoint.allow_changed=[train.max_steps]")
    train_two_steps(*constant, "train.max_steps=20")
    train_two_steps(*constant, "train.max_steps=30")
    text = (tmp_path / "runs/run/metrics.jsonl").read_text()
    epochs = [record for line in text.splitlines() if (record := json.loads(line))["split"] == "train_epoch"]
    assert [(record["step"], record["count"]) for record in epochs] == [(12, 1437), (24, 1437)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "checkpoint: none is given"),
        (["checkpoint=nowhere"], "checkpoint nowhere: no such file or directory"),
        (["checkpoint=."], "has no checkpoints"),
        (["checkpoint=c.pt", "data.nam=digits"], "did you mean data.name?"),
        (["checkpoint=other.pt"], "another architecture"),
        (
            ["checkpoint=c.pt", "--split=val", "device=cpu"],
            "--split val: the run has no validation set; give --split test",
        ),
    ],
)
def test_evaluation(error_of, tmp_path, words, message):
    config = load_config([], ["data.name=digits"]).to_dict()
    other = Net()
    del other.fc3
    for name, net in (("c.pt", Net()), ("other.pt", other)):
        write_atomically({"model": net.state_dict(), "step": 1, "epoch": 0, "config": config}, tmp_path / name)
    assert message in error_of(*words, main=evaluate.main)


def test_the_environment(error_of, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert "RANK is set, but not LOCAL_RANK, WORLD_SIZE" in error_of(*DIGITS)


@pytest.mark.parametrize(
    ("environ", "kind", "lingers", "prints"),
    [
        ({}, UserError, False, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, UserError, False, True),
        ({"RANK": "1", "LOCAL_RANK": "1"}, UserError, True, True),  # if torchrun has not ended it before
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, UserError, False, True),
        ({"SLURM_PROCID": "2", "SLURM_LOCALID": "0"}, UserError, True, False),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, UserError, True, True),  # if mpirun has not
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, RankError, False, True),
        ({"PMI_RANK": "1", "MPI_LOCALRANKID": "1", "SLURM_PROCID": "0"}, UserError, True, True),  # of the daemon
        ({"PMI_RANK": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, UserError, False, True),  # srun started them
        ({"SLURM_PROCID": "2", "SLURM_LOCALID": "0"}, RankError, False, True),  # may concern its node only
        ({"SLURM_PROCID": "3", "SLURM_LOCALID": "1"}, RankError, True, False),
        ({"JOB_COMPLETION_INDEX": "1", "WORLD_SIZE": "2"}, UserError, True, False),
        ({"JOB_COMPLETION_INDEX": "1", "WORLD_SIZE": "2"}, RankError, False, True),  # a pod is a node
        ({"JOB_COMPLETION_INDEX": "1"}, UserError, False, True),  # such as the report of a run, once per pod
    ],
)
def test_the_first_rank_prints_and_the_others_linger(monkeypatch, capsys, environ, kind, lingers, prints):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    waits = []
    monkeypatch.setattr("distlenet.distributed.entry_point.time", SimpleNamespace(sleep=waits.append))

    def main():
        raise kind("two\nlines")

    with pytest.raises(SystemExit) as ended:
        run_entry(main)
    assert ended.value.code == 2
    assert waits == [LINGER_S] * lingers
    assert capsys.readouterr().err == "distlenet: two lines\n" * prints


def test_any_other_failure_is_a_traceback(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)

    def main():
        raise ZeroDivisionError("division by zero")

    with pytest.raises(SystemExit) as ended:
        run_entry(main)
    assert ended.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["distlenet: failed:", "  Traceback (most recent call last):"]
    assert lines[-1] == "  ZeroDivisionError: division by zero"
    assert not any("/entry_point.py" in line for line in lines)


BROKEN_PIPE = """
import os, socket, sys
from distlenet.distributed.entry_point import run_entry

def print_lines():
    print("line", flush=True)

def send_to_closed_socket():
    sender, receiver = socket.socketpair()
    receiver.close()
    sender.send(b"x")

os.read(0, 1)  # until the reader of standard output has exited, or may continue
run_entry(globals()[sys.argv[1]])
"""


@pytest.mark.parametrize(
    ("function", "closed", "status"),
    [("print_lines", True, 0), ("send_to_closed_socket", True, 0), ("send_to_closed_socket", False, 1)],
)
def test_a_broken_pipe_is_success_only_if_the_reader_of_the_output_has_exited(function, closed, status):
    command = [sys.executable, "-c", BROKEN_PIPE, function]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=clean_environment(), stdin=pipe, stdout=pipe, stderr=pipe, text=True) as ended:
        try:
            if closed:
                ended.stdout.close()
            ended.stdin.close()
            error = ended.stderr.read()
            assert ended.wait(LIMIT_S) == status, error
        finally:
            ended.kill()
    assert ("BrokenPipeError" in error) == bool(status)


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments("x", "y", ["--help"])
    assert ended.value.code == 0
    assert "train.global_batch_size" in capsys.readouterr().out


def test_a_process_with_a_user_error(tmp_path):
    ended = run_command(sys.executable, "-m", "distlenet.train", "optim.lrr=1", cwd=tmp_path)
    assert (ended.status, ended.stdout) == (2, ""), str(ended)
    assert ended.stderr == "distlenet: optim.lrr=1: unknown key 'optim.lrr'; did you mean optim.lr?\n"
    assert not list(tmp_path.iterdir())


def test_the_data_command(tmp_path):
    words = (sys.executable, "-m", "distlenet.data", "data.name=digits")
    ended = run_command(*words, cwd=tmp_path).succeeded()
    assert ended.stdout == "digits: 1437 training and 360 test images, verified, in bundled\n"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads threads from /proc")
def test_no_thread_of_the_process_group_remains_after_training(tmp_path):
    """A Gloo thread that outlives the interpreter may abort it: status 134 after a successful run.

    The kernel may list a thread for a moment after another one has joined it.
    """
    script = (
        "import contextlib, pathlib, time\n"
        "from distlenet.config.loading import load_config\n"
        "from distlenet.train import train\n"
        "def gloo_threads():\n"
        "    names = []\n"
        "    for file in pathlib.Path('/proc/self/task').glob('*/comm'):\n"
        "        with contextlib.suppress(OSError):\n"
        "            names.append(file.read_text().strip())\n"
        "    return [name for name in names if 'gloo' in name]\n"
        "train(load_config([], ['data.name=digits', 'device=cpu', 'train.max_steps=2', 'run.name=x']))\n"
        "deadline = time.monotonic() + 10\n"
        "while gloo_threads() and time.monotonic() < deadline:\n"
        "    time.sleep(0.01)\n"
        "print('threads', gloo_threads())"
    )
    ended = run_command(sys.executable, "-c", script, cwd=tmp_path).succeeded()
    assert ended.stdout.endswith("threads []\n"), str(ended)
