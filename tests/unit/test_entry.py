"""Bad input, as a user meets it: exit status 2 and one line, from the commands' own main functions."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import run_command
from idx_files import small_set, write_set

from distlenet import entry, evaluate, train
from distlenet.checkpoint import write_atomically
from distlenet.config import load_config
from distlenet.entry import parse_arguments, run_entry
from distlenet.errors import RankError, UserError
from distlenet.net import Net

pytestmark = pytest.mark.unit


@pytest.fixture
def given(monkeypatch, tmp_path, fails):
    """Run a command's main with arguments that must be refused, inside an empty folder; return the line."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)

    def check(*words: str, main=train.main) -> str:
        monkeypatch.setattr(sys, "argv", ["distlenet", *words])
        return fails(main)

    return check


DIGITS = ("data.name=digits", "device=cpu")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["optim.lrr=1"], "did you mean optim.lr?"),
        (["train.epochs=many"], "expected a whole number"),
        (["train.epochs=-3"], "at least 1"),
        (["--config", "none.yaml"], "--config none.yaml: cannot be read: No such file or directory"),
        (["--config", "broken.yaml"], "--config broken.yaml: not valid YAML"),
        (["--epochs", "3"], "unrecognized arguments: --epochs"),
        (["data.root=truncated"], "truncated/train-images-idx3-ubyte.gz is damaged"),
        (["data.root=foreign"], "is not the published file"),
        (["data.root=broken.yaml"], "data.root=broken.yaml: is not a folder"),
        ([*DIGITS, "distributed.backend=nccl"], "distributed.backend=nccl"),
        ([*DIGITS, "precision=fp16"], "precision=fp16: needs a GPU"),
        ([*DIGITS, "train.global_batch_size=7", "train.accumulation_steps=2"], "the nearest that do: 6 or 8"),
        ([*DIGITS, "checkpoint.resume=nowhere"], "checkpoint nowhere: no such file"),
        ([*DIGITS, "checkpoint.resume=other.pt"], "another architecture"),
        ([*DIGITS, "checkpoint.resume=broken.yaml"], "is damaged or not a checkpoint"),
        ([*DIGITS, "checkpoint.resume=seed-1.pt"], "seed (was 1, now 0)"),
        ([*DIGITS, "checkpoint.path=seed-1.pt"], "checkpoint.resume"),
        ([*DIGITS, "run.dir=broken.yaml"], "run folder broken.yaml"),
        ([*DIGITS, "data.drop_last=true", "train.global_batch_size=4000"], "drops all 1437 images"),
    ],
)
def test_training(given, tmp_path, words, part):
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
    assert part in given(*words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that the message misses")
def test_a_missing_gpu(given):
    assert "device=cuda: no GPU is visible" in given(*DIGITS, "device=cuda")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "which checkpoint?"),
        (["checkpoint=nowhere"], "checkpoint nowhere: no such file or run folder"),
        (["checkpoint=."], "holds no checkpoints"),
        (["checkpoint=c.pt", "data.nam=digits"], "did you mean data.name?"),
        (["checkpoint=other.pt"], "another architecture"),
    ],
)
def test_evaluation(given, tmp_path, words, part):
    config = load_config([], ["data.name=digits"]).to_dict()
    other = Net()
    del other.fc3
    for name, net in (("c.pt", Net()), ("other.pt", other)):
        write_atomically({"model": net.state_dict(), "step": 1, "epoch": 0, "config": config}, tmp_path / name)
    assert part in given(*words, main=evaluate.main)


@pytest.mark.parametrize(
    ("environ", "part"),
    [
        ({"RANK": "0"}, "RANK is set but LOCAL_RANK, WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set but RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "rank 2 in a world of 2"),
    ],
)
def test_the_environment(given, monkeypatch, environ, part):
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", **environ}.items():
        monkeypatch.setenv(name, value)
    assert part in given(*DIGITS)


def test_other_ranks_stay_silent_but_for_what_they_alone_see(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(entry, "LINGER_S", 0.0)
    for error, shown in ((UserError("settings"), ""), (RankError("my own"), "distlenet: my own\n")):

        def main(error=error):
            raise error

        with pytest.raises(SystemExit) as ended:
            run_entry(main)
        assert ended.value.code == 2
        assert capsys.readouterr().err == shown


def test_other_exceptions_keep_their_traceback(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)

    def main():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_entry(main)


def test_files_and_overrides_come_in_any_order():
    words = ["seed=1", "--config", "a.yaml", "optim.lr=-1", "--config", "b.yaml"]
    assert parse_arguments("x", "y", words) == (["a.yaml", "b.yaml"], ["seed=1", "optim.lr=-1"])


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments("x", "y", ["--help"])
    assert ended.value.code == 0
    assert "train.global_batch_size" in capsys.readouterr().out


def test_a_real_process_ends_with_status_2_and_one_line(tmp_path):
    ended = run_command(sys.executable, "-m", "distlenet.train", "optim.lrr=1", timeout=60, cwd=tmp_path)
    assert (ended.status, ended.stdout) == (2, ""), str(ended)
    assert ended.stderr == "distlenet: optim.lrr=1: unknown key 'optim.lrr'; did you mean optim.lr?\n"
    assert not list(tmp_path.iterdir())


def test_the_data_command_says_where(tmp_path):
    words = (sys.executable, "-m", "distlenet.data", "data.name=digits")
    ended = run_command(*words, timeout=60, cwd=tmp_path).succeeded()
    assert ended.stdout == "digits: 1437 training and 360 test images, verified, in bundled\n"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads threads from /proc")
def test_no_thread_of_the_group_outlives_the_run(tmp_path):
    """A Gloo thread that outlives the interpreter aborts it now and then, with status 134 after a good run."""
    script = (
        "import os; from distlenet.config import load_config; from distlenet.train import train\n"
        "train(load_config([], ['data.name=digits', 'device=cpu', 'train.max_steps=2', 'run.name=x']))\n"
        "names = [open(f'/proc/self/task/{t}/comm').read().strip() for t in os.listdir('/proc/self/task')]\n"
        "print('threads', [name for name in names if 'gloo' in name])"
    )
    ended = run_command(sys.executable, "-c", script, timeout=120, cwd=tmp_path).succeeded()
    assert ended.stdout.endswith("threads []\n"), str(ended)
