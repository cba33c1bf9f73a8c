"""Signals, stopped and killed ranks, killed agents, full and read-only disks."""

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import LIMIT_S, REPO, Job, process_tree, run_command, signal_all
from forked import run_python, run_ranks

from distlenet.checkpoint.format import load_checkpoint
from distlenet.checkpoint.store import CheckpointStore
from distlenet.prove.processes import free_port
from distlenet.report.runs import read_run
from distlenet.tracking.base import NONDETERMINISTIC_KEYS

pytestmark = pytest.mark.ranks

SETTINGS = (
    "device=cpu",
    "data.name=digits",
    "data.augment=shift",
    "data.ledger=true",
    "distributed.reduction=exact",
    "train.global_batch_size=64",
    "train.epochs=16",
    "train.log_every=5",
    "optim.lr=0.05",
    "run.name=run",
)
TRAIN = ("-m", "distlenet.train", *SETTINGS)  # 368 steps
HELD = Path(__file__).with_name("held_program.py")
AGENT = ("--standalone", "--nproc-per-node=2")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", *AGENT)
WARM = (sys.executable, "-m", "distlenet.launch", *AGENT)  # what the launch scripts start


def weights(run: Path) -> dict[str, torch.Tensor]:
    assert (run / "summary.json").exists()
    newest = CheckpointStore(run / "checkpoints", keep_last=1).newest()
    assert newest is not None
    return load_checkpoint(newest)["model"]


def records(run: Path) -> list[dict]:
    content = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in NONDETERMINISTIC_KEYS} for record in content]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """An uninterrupted run in one process."""
    directory = tmp_path_factory.mktemp("reference")
    run_python(*TRAIN, f"run.dir={directory}").succeeded()
    return directory / "run"


def assert_same(run: Path, reference: Path) -> None:
    a, b = weights(run), weights(reference)
    assert all(torch.equal(a[name], b[name]) for name in a | b)
    assert records(run) == records(reference)
    run_python("-m", "distlenet.ledger", run).succeeded()


@pytest.mark.usefixtures("python_handles_ctrl_c")
@pytest.mark.parametrize(
    ("number", "status", "name"), [(signal.SIGUSR2, 75, "SIGUSR2"), (signal.SIGINT, 130, "SIGINT (Ctrl-C)")]
)
def test_signal_to_one_process_saves_and_exits(tmp_path, reference, number, status, name):
    settings = (f"run.dir={tmp_path}", "data.num_workers=1")
    with Job(tmp_path, sys.executable, HELD, tmp_path, "100", *SETTINGS, *settings) as job:
        job.wait_for_step(5)
        job.process.send_signal(number)
        ended = job.wait()
    assert ended.status == status, str(ended)
    *announced, message = [line for line in ended.stdout.splitlines() if line.startswith("distlenet: ")]
    announcement = "distlenet: Ctrl-C: saving after this step; Ctrl-C again ends without a save"
    assert announced == [announcement] * (number == signal.SIGINT)
    newest = CheckpointStore(tmp_path / "run/checkpoints", keep_last=1).newest()
    step = load_checkpoint(newest)["step"]
    assert message == f"distlenet: stopped by {name} after step {step}, saved; run the same command again to resume"
    run_python(*TRAIN, *settings).succeeded()
    assert_same(tmp_path / "run", reference)


@pytest.mark.usefixtures("python_handles_ctrl_c")
def test_torchrun_forwards_the_signal_and_the_next_job_ends_with_the_same_bits(tmp_path, reference):
    """SIGTERM; and Ctrl-C, which reaches only the agent, since each rank is in a separate session."""
    stops = ((TORCHRUN, "100", 5, signal.SIGTERM, 1), (WARM, "200", 105, signal.SIGINT, 130))
    for launcher, held_at, seen, number, status in stops:
        with Job(tmp_path, *launcher, HELD, tmp_path, held_at, *SETTINGS, f"run.dir={tmp_path}") as job:
            job.wait_for_step(seen)
            job.process.send_signal(number)
            ended = job.wait()
        assert ended.status == status, str(ended)
        assert ended.stdout.count(f"stopped by {number.name}") == 1, str(ended)
    *_, line, end = ended.stdout.splitlines()
    assert line.startswith("distlenet: stopped by SIGINT (Ctrl-C) after step"), str(ended)
    assert line.endswith("saved; run the same command again to resume")
    assert end == "distlenet: all ranks of this node have ended after SIGINT"
    run_ranks(2, *TRAIN, f"run.dir={tmp_path}").succeeded()
    assert_same(tmp_path / "run", reference)


def test_signal_to_one_rank_stops_all_ranks(tmp_path, reference):
    words = (*WARM, HELD, tmp_path, "100", *SETTINGS, f"run.dir={tmp_path}")
    with Job(tmp_path, *words) as job:
        job.wait_for_step(5)
        os.kill(job.rank_pids()[2], signal.SIGUSR2)  # rank 1; the fork server is the first
        ended = job.wait()
    assert ended.stdout.count("stopped by a signal to another rank after step") == 1, str(ended)
    assert ended.status == 75, str(ended)  # that of the ranks; torchrun's would be 1
    run_ranks(2, *TRAIN, f"run.dir={tmp_path}").succeeded()
    assert_same(tmp_path / "run", reference)


IN_EVALUATION = """
import os, signal
from distlenet import train
from distlenet.distributed.entry_point import run_entry
from distlenet.tasks.image_classification import ImageClassification
from distlenet.training.evaluator import Evaluator
class Task(ImageClassification):
    eval_batch_size = 20
    batches = 0
    def transform(self, data, keys):
        self.batches += keys is None
        if keys is None and self.batches == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().transform(data, keys)
Evaluator.stop_check_interval = 1
run_entry(lambda: train.main(Task))
"""


def test_stop_during_an_evaluation_duplicates_and_loses_no_record(tmp_path, reference):
    script = tmp_path / "script.py"
    script.write_text(IN_EVALUATION)
    ended = run_ranks(2, script, *SETTINGS, f"run.dir={tmp_path}")
    assert "after step 23, saved" in ended.stderr, str(ended)
    assert {record["split"] for record in records(tmp_path / "run")} == {"train"}
    run_ranks(2, *TRAIN, f"run.dir={tmp_path}", "checkpoint.allow_changed=[code]").succeeded()  # not by the script
    assert_same(tmp_path / "run", reference)


@pytest.mark.parametrize("rank", [0, 1])
def test_unresponsive_rank_ends_the_job_and_is_named(tmp_path, rank):
    words = (*TRAIN, "train.epochs=5000", "distributed.step_timeout_s=15", f"run.dir={tmp_path}")
    with Job(tmp_path, *TORCHRUN, *words) as job:
        job.wait_for_records()
        stopped = job.rank_pids()[rank]
        os.kill(stopped, signal.SIGSTOP)
        # After 15 s without a step and 1.5 s of queries, torchrun waits up to 30 s for the stopped rank.
        job.wait_until(lambda: "no step ended for 15 s" in job.output(), "the message")
        signal_all([stopped], signal.SIGKILL)  # the other one has exited
        ended = job.wait()
    assert ended.status == 1
    messages = [line for line in ended.stdout.splitlines() if "no step ended" in line]
    assert len(messages) == 1, str(ended)
    assert messages[0].endswith(f"; no answer from rank {rank} on {socket.gethostname()}"), messages


def test_unresponsive_rank_with_the_store_is_named(tmp_path):
    """Without torchrun, rank 0 holds the store."""
    sizes = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    common = {**sizes, "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    words = (sys.executable, *TRAIN, "train.epochs=5000", "distributed.step_timeout_s=15", f"run.dir={tmp_path}")
    with (
        Job(tmp_path, *words, env={**common, "RANK": "0", "LOCAL_RANK": "0"}) as first,
        Job(tmp_path, *words, env={**common, "RANK": "1", "LOCAL_RANK": "1"}) as second,
    ):
        first.wait_for_records()
        first.process.send_signal(signal.SIGSTOP)
        ended = second.wait()
    assert ended.status == 1, str(ended)
    assert f"rank 0 on {socket.gethostname()} does not respond to rank 1" in ended.stdout, str(ended)


def test_missing_rank_is_named(tmp_path):
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "localhost"}
    env["MASTER_PORT"] = str(free_port())
    words = (*TRAIN, "distributed.init_timeout_s=2", f"run.dir={tmp_path}")
    ended = run_python(*words, env=env)
    assert ended.status == 2, str(ended)
    assert "ranks 1, 2 did not join in time (distributed.init_timeout_s)" in ended.stderr, str(ended)
    assert "Traceback" not in ended.stderr


def test_killed_agent_leaves_no_process(tmp_path):
    with Job(tmp_path, *WARM, *TRAIN, "train.epochs=5000", "data.num_workers=1", f"run.dir={tmp_path}") as job:
        job.wait_for_records()
        pids = process_tree(job.process.pid)
        assert len(pids) == 6, pids  # the agent, the fork server, two ranks, and one loader worker each
        for rank in pids[2:4]:  # forked; the command line is that of the fork server
            assert b"distlenet.launch.fork_server" in Path(f"/proc/{rank}/cmdline").read_bytes()
        job.process.kill()
        job.process.wait()
        deadline = time.monotonic() + LIMIT_S
        while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
            assert time.monotonic() < deadline, f"left: {left}"
            time.sleep(0.02)


def test_killed_ranks_are_restarted_within_the_job(tmp_path, reference):
    """Twice: forked from the fork server, and, after that was killed, in a new interpreter or from the next server."""
    words = (*WARM, "--max-restarts=3", HELD, tmp_path, "100,250", *SETTINGS, "checkpoint.every_steps=3")
    with Job(tmp_path, *words, f"run.dir={tmp_path}") as job:
        # Rank 1; the fork server, which is the first, and rank 0. Only restarted ranks reach step 120.
        for seen, victims, held_at in ((20, slice(2, 3), 100), (120, slice(0, 2), 250)):
            job.wait_for_step(seen)
            signal_all(job.rank_pids()[victims], signal.SIGKILL)
            (tmp_path / f"released-{held_at}").touch()
        ended = job.wait()
    assert ended.status == 0, str(ended)
    assert_same(tmp_path / "run", reference)
    assert json.loads((tmp_path / "run/summary.json").read_text())["restarts"] == 2
    assert len(read_run(tmp_path / "run").restarts) == 2  # in the report
    assert [line.rpartition("(")[2] for line in ended.stdout.splitlines() if line.startswith("resumed")] == [
        "restart 1 of 3)",
        "restart 2 of 3)",
    ]
    assert "RuntimeError" in (tmp_path / "run/logs/rank-00000.log").read_text()  # the failure that the other rank saw


def test_restarts_without_progress_end(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(
        "from distlenet import train\nfrom distlenet.training.trainer import Trainer\n"
        "from distlenet.distributed.entry_point import run_entry\n"
        "class Failing(Trainer):\n    def step(self, batch):\n        raise MemoryError('every time')\n"
        "run_entry(lambda: train.main(trainer_class=Failing))\n"
    )
    settings = (*SETTINGS, "checkpoint.max_restarts_without_progress=2", f"run.dir={tmp_path}")
    words = (*TORCHRUN, "--max-restarts=20", script, *settings)
    ended = run_command(*words, timeout=300)
    assert ended.status == 1
    assert "restarted 2 times from step 0 and never reached the next checkpoint" in ended.stderr, str(ended)
    assert (tmp_path / "run/logs/rank-00001.log").read_text().count("MemoryError: every time") == 3


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 3 MB; a checkpoint has 0.65 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    directory = tmp_path / "disk"
    directory.mkdir()
    run_command("mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", directory).succeeded()
    yield directory
    run_command("umount", "--lazy", directory).succeeded()


def fill(disk: Path) -> None:
    """Fill the file system completely, also with what has become free since the last call."""
    with contextlib.suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_training_continues_on_a_full_disk_and_saves_when_there_is_space_again(small_disk, reference):
    directory, settings = small_disk.parent, (*SETTINGS, "checkpoint.every_steps=5", "checkpoint.keep_last=1")

    def warned() -> bool:
        fill(small_disk)  # again: the removal of an older checkpoint may have made room for the next
        return "saves again when the next checkpoint is due" in job.output()

    with Job(directory, *TORCHRUN, HELD, directory, "100,250", *settings, f"run.dir={small_disk}") as job:
        job.run = small_disk / "run"
        job.wait_until(lambda: any(job.run.glob("checkpoints/step-*.pt")), "a checkpoint")
        fill(small_disk)
        (directory / "released-100").touch()
        job.wait_until(warned, "the warning")
        before = load_checkpoint(next(job.run.glob("checkpoints/step-*.pt")))["step"]
        (small_disk / "filler").unlink()
        (directory / "released-250").touch()
        job.wait_until(
            lambda: max(int(p.stem[5:]) for p in job.run.glob("checkpoints/step-*.pt")) > before, "a later checkpoint"
        )
        ended = job.wait()
    assert ended.status == 0, str(ended)
    assert ended.stdout.count("saves again when the next checkpoint is due") == 1, str(ended)
    assert_same(small_disk / "run", reference)


def test_disk_that_stays_full_fails_the_job_at_its_end(small_disk):
    words = (*TRAIN, "train.epochs=3", f"run.dir={small_disk}")
    fill(small_disk)
    os.truncate(small_disk / "filler", (small_disk / "filler").stat().st_size - 100_000)
    ended = run_ranks(2, *words)
    assert ended.status == 2
    assert "epoch 3/3  test loss" in ended.stdout, str(ended)
    # On a busy machine, rank 1 does not wait long enough for rank 0, and prints the last line, too.
    ours = list(dict.fromkeys(line for line in ended.stderr.splitlines() if line.startswith("distlenet: ")))
    assert len(ours) == 2, str(ended)
    assert "No space left on device; training continues" in ours[0]
    assert ours[1].startswith("distlenet: the trained network is not saved: ")


def test_read_only_directory_keeps_the_older_checkpoints(small_disk, reference):
    directory, settings = small_disk.parent, ("checkpoint.every_steps=5", "checkpoint.keep_last=1")
    words = (*SETTINGS, *settings, f"run.dir={small_disk}")
    with Job(directory, *TORCHRUN, HELD, directory, "100", *words) as job:
        job.run = small_disk / "run"
        job.wait_until(lambda: any(job.run.glob("checkpoints/step-*.pt")), "a checkpoint")
        run_command("mount", "--bind", "-o", "ro", small_disk, small_disk).succeeded()
        (directory / "released-100").touch()
        ended = job.wait()
    run_command("umount", small_disk).succeeded()
    assert ended.status == 1, str(ended)  # torchrun's; the rank's is 2
    assert ended.stdout.count("Read-only file system; training continues") == 1, str(ended)
    assert "the trained network is not saved" in ended.stdout, str(ended)
    run_ranks(2, "-m", "distlenet.train", *words).succeeded()  # the saved files are intact; the run resumes
    assert_same(small_disk / "run", reference)


def test_local_launcher(tmp_path, reference):
    command = (REPO / "launch/local.sh", "-n", 2, *SETTINGS, f"run.dir={tmp_path}")
    run_command(*command, env={"PYTHON": sys.executable}).succeeded()
    assert json.loads((tmp_path / "run/summary.json").read_text())["world_size"] == 2
    assert_same(tmp_path / "run", reference)
