"""Bad input, as a user meets it: exit status 2 and one line, from the commands' own main functions."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_command
from filelock import FileLock
from idx_files import small_set, write_set

from distlenet import evaluate, train
from distlenet.checkpoint.format import write_atomically
from distlenet.config.arguments import parse_arguments
from distlenet.config.loading import load_config
from distlenet.distributed import entry_point as entry
from distlenet.distributed.entry_point import run_entry
from distlenet.models.lenet import Net
from distlenet.utils.errors import RankError, UserError

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
        (["train.epochs=many"], "expected an integer"),
        (["train.epochs=-3"], "at least 1"),
        (["--config", "none.yaml"], "--config none.yaml: cannot be read: No such file or directory"),
        (["--config", "broken.yaml"], "--config broken.yaml: not valid YAML"),
        (["--epochs", "3"], "unrecognized arguments: --epochs"),
        (["data.root=truncated"], "truncated/train-images-idx3-ubyte.gz: is damaged"),
        (["data.root=foreign"], "is not the published file"),
        (["data.root=broken.yaml"], "data.root=broken.yaml: is not a folder"),
        ([*DIGITS, "distributed.backend=nccl"], "distributed.backend=nccl"),
        ([*DIGITS, "precision=fp16"], "precision=fp16: needs a GPU"),
        ([*DIGITS, "train.global_batch_size=7", "train.accumulation_steps=2"], "; give 6 or 8"),
        ([*DIGITS, "checkpoint.resume=nowhere"], "checkpoint nowhere: no such file"),
        ([*DIGITS, "checkpoint.resume=other.pt"], "another architecture"),
        ([*DIGITS, "checkpoint.resume=broken.yaml"], "cannot be read: its bytes do not match"),
        ([*DIGITS, "checkpoint.resume=seed-1.pt"], "seed (was 1, now 0)"),
        ([*DIGITS, "checkpoint.path=seed-1.pt"], "checkpoint.resume"),
        ([*DIGITS, "run.dir=broken.yaml"], "run folder broken.yaml"),
        (
            [*DIGITS, "data.drop_last=true", "train.global_batch_size=4000"],
            "=true: drops all 1437 images",
        ),
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


def quick(*more: str) -> None:
    train.train(load_config([], [*DIGITS, "train.max_steps=2", "run.name=run", *more]))


def test_a_refused_run_leaves_the_good_one_as_it_was(given, tmp_path):
    quick()

    def files():
        found = {path: path.read_bytes() for path in (tmp_path / "runs/run").rglob("*") if path.is_file()}
        return {path: content for path, content in found.items() if path.suffix != ".log"}  # where starts are told

    before = files()
    for change in ("seed=5", "checkpoint.resume=never", "optim.warmup_steps=2"):
        given(*DIGITS, "train.max_steps=2", "run.name=run", change)
    assert files() == before


def test_two_jobs_in_one_run_folder(given, tmp_path):
    (tmp_path / "runs/run").mkdir(parents=True)
    with FileLock(tmp_path / "runs/run/.lock"):
        assert "another job is writing there" in given(*DIGITS, "run.name=run")
    quick()


@pytest.mark.parametrize("key", ["optimizer", "schedule", "meter", "batch", "best_accuracy"])
def test_a_checkpoint_without_the_state_of_training(given, tmp_path, key):
    quick()
    path = tmp_path / "runs/run/checkpoints/step-00000002.pt"
    state = torch.load(path, weights_only=True)
    del state[key]
    write_atomically(state, path)
    told = given(*DIGITS, "train.max_steps=2", f"checkpoint.resume={path}", "run.name=other")
    assert "no state that training can go on from" in told


def test_a_checkpoint_whose_optimizer_is_of_a_tensor_where_a_parameter_has_its_number(given, tmp_path):
    """A tensor of 0 equals 0."""
    quick()
    path = tmp_path / "runs/run/checkpoints/step-00000002.pt"
    state = torch.load(path, weights_only=True)
    state["optimizer"]["param_groups"][0]["params"][0] = torch.zeros(1)
    write_atomically(state, path)
    told = given(*DIGITS, "train.max_steps=2", f"checkpoint.resume={path}", "run.name=other")
    assert "optimizer.param_groups are of the parameters" in told


def test_a_warm_up_longer_than_the_run(given):
    assert "the run has 2 steps" in given(*DIGITS, "train.max_steps=2", "optim.warmup_steps=2")


def test_max_steps_inside_an_epoch_goes_on_later_in_the_same_epoch(given, tmp_path):
    """23 steps make an epoch; its record comes once, of all its images."""
    constant = ("optim.schedule=constant", "optim.lr=0.01")
    quick(*constant, "train.max_steps=20")
    quick(*constant, "train.max_steps=30", "train.epochs=9", "checkpoint.allow_changed=[train.max_steps,train.epochs]")
    text = (tmp_path / "runs/run/metrics.jsonl").read_text()
    epochs = [record for line in text.splitlines() if (record := json.loads(line))["split"] == "train_epoch"]
    assert [(record["step"], record["count"]) for record in epochs] == [(12, 1437), (24, 1437)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that the message misses")
def test_a_missing_gpu(given):
    assert "device=cuda: no GPU is visible" in given(*DIGITS, "device=cuda")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "checkpoint: none is given"),
        (["checkpoint=nowhere"], "checkpoint nowhere: no such file or directory"),
        (["checkpoint=."], "has no checkpoints"),
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
        ({"RANK": "0"}, "RANK is set, but not LOCAL_RANK, WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, but not RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "rank 2 of 2 ranks"),
    ],
)
def test_the_environment(given, monkeypatch, environ, part):
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", **environ}.items():
        monkeypatch.setenv(name, value)
    assert part in given(*DIGITS)


@pytest.mark.parametrize(
    ("environ", "kind", "lingers", "speaks"),
    [
        ({}, UserError, False, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, UserError, False, True),
        ({"RANK": "1", "LOCAL_RANK": "1"}, UserError, True, True),  # torchrun has ended it before, if rank 0 spoke
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, UserError, False, True),
        ({"SLURM_PROCID": "2", "SLURM_LOCALID": "0"}, UserError, True, False),
        ({"SLURM_PROCID": "2", "SLURM_LOCALID": "0"}, RankError, False, True),  # what its node may see alone
        ({"SLURM_PROCID": "3", "SLURM_LOCALID": "1"}, RankError, True, False),
    ],
)
def test_the_first_rank_speaks_and_the_others_wait_for_it(monkeypatch, capsys, environ, kind, lingers, speaks):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    waits = []
    monkeypatch.setattr(entry.time, "sleep", waits.append)

    def main():
        raise kind("two\nlines")

    with pytest.raises(SystemExit) as ended:
        run_entry(main)
    assert ended.value.code == 2
    assert waits == [entry.LINGER_S] * lingers
    assert capsys.readouterr().err == "distlenet: two lines\n" * speaks


def test_what_the_user_cannot_mend_is_one_block_with_its_traceback(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)

    def main():
        raise ZeroDivisionError("by nothing")

    with pytest.raises(SystemExit) as ended:
        run_entry(main)
    assert ended.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["distlenet: failed:", "  Traceback (most recent call last):"]
    assert lines[-1] == "  ZeroDivisionError: by nothing"
    assert not any("/entry.py" in line for line in lines)


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
        "import os; from distlenet.config.loading import load_config; from distlenet.train import train\n"
        "train(load_config([], ['data.name=digits', 'device=cpu', 'train.max_steps=2', 'run.name=x']))\n"
        "names = [open(f'/proc/self/task/{t}/comm').read().strip() for t in os.listdir('/proc/self/task')]\n"
        "print('threads', [name for name in names if 'gloo' in name])"
    )
    ended = run_command(sys.executable, "-c", script, timeout=120, cwd=tmp_path).succeeded()
    assert ended.stdout.endswith("threads []\n"), str(ended)
