"""A failing rank: one traceback for the user, a log per rank, a diagnosis, and stacks on request."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from conftest import Job, run_torchrun
from forked import run_ranks

pytestmark = pytest.mark.ranks

SETTINGS = ("data.name=digits", "device=cpu", "train.global_batch_size=66", "run.name=run")

DIES = """
from distlenet import train
from distlenet.training.trainer import Trainer
from distlenet.distributed.entry_point import run_entry
class Dies(Trainer):
    def step(self, batch):
        if self.state.step == 5 and self.env.rank == 1:
            raise MemoryError("on purpose")
        return super().step(batch)
run_entry(lambda: train.main(trainer_class=Dies))
"""


def test_the_first_failure_is_a_traceback_and_the_others_are_silent(tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    ended = run_torchrun(3, script, *SETTINGS, f"run.dir={tmp_path}")
    assert ended.status == 1
    output = ended.stderr.partition("torch/distributed/elastic")[0]
    lines = [line for line in ended.stderr.splitlines() if line.startswith("distlenet: ")]
    assert re.match(r"distlenet: rank 1 of 3 on \S+ failed; the log is \S+/logs/rank-00001\.log:$", lines[0]), str(
        ended
    )
    assert output.splitlines()[-2] == "  MemoryError: on purpose", str(ended)  # then only torchrun's report
    assert output.count("MemoryError: on purpose") == 1, str(ended)
    for rank in range(3):
        log = (tmp_path / f"run/logs/rank-{rank:05d}.log").read_text()
        assert f"rank {rank} of 3 on " in log
        assert log.count("Traceback") == 1
    assert len(lines) == 1, str(ended)
    assert "MemoryError: on purpose" in (tmp_path / "run/logs/rank-00001.log").read_text()


def test_a_rank_writes_its_stacks_on_request(tmp_path):
    words = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "distlenet.train")
    words = (sys.executable, *words, *SETTINGS, "train.epochs=1000", "train.log_every=5", f"run.dir={tmp_path}")
    log = tmp_path / "run/logs/rank-00001.log"
    with Job(tmp_path, *words) as job:
        job.wait_for_records(2)
        os.kill(job.rank_pids()[1], signal.SIGSTOP)  # the other rank then waits in a collective
        try:
            os.kill(job.rank_pids()[0], signal.SIGURG)
            other = log.with_name("rank-00000.log")
            job.wait_until(lambda: "most recent call first" in other.read_text(), "stacks")
        finally:
            os.kill(job.rank_pids()[1], signal.SIGCONT)
        job.wait_for_records(1)  # training continues
        assert "Thread 0x" in other.read_text()
        assert "trainer.py" in other.read_text()
        assert "most recent call first" not in log.read_text()


POISON = """
from distlenet import train
from distlenet.distributed.entry_point import run_entry
from distlenet.tasks.image_classification import ImageClassification
class Poisoned(ImageClassification):
    def transform(self, data, keys):
        inputs, labels = super().transform(data, keys)
        if keys is not None:
            inputs[keys.indices == 77] = float("nan")
        return inputs, labels
run_entry(lambda: train.main(Poisoned))
"""


@pytest.mark.parametrize("reduction", ["ddp", "exact"])
def test_a_non_finite_loss_stops_all_ranks_and_is_reported_with_its_rank(tmp_path, reduction):
    script = tmp_path / "poison.py"
    script.write_text(POISON)
    words = (f"distributed.reduction={reduction}", "train.global_batch_size=64", f"run.dir={tmp_path}")
    ended = run_ranks(2, script, *SETTINGS, *words)
    # A set: if rank 0 exits while rank 1 still cleans up, rank 1 waits 10 s and repeats the line.
    (line,) = {line for line in ended.stderr.splitlines() if line.startswith("distlenet: ")}
    step, rank = map(int, re.match(r"distlenet: step (\d+): the loss of rank (\d) is not finite", line).groups())
    report = json.loads((tmp_path / f"run/diagnosis/step-{step:08d}.json").read_text())
    (rank_report,) = report["ranks"]
    assert rank_report["rank"] == rank
    assert rank_report["worst"][0]["index"] == 77
    assert 77 in rank_report["indices"]
    assert not list((tmp_path / "run/checkpoints").glob("*.pt"))


def test_a_skipped_step_is_the_same_on_any_number_of_ranks(tmp_path):
    script = tmp_path / "poison.py"
    script.write_text(POISON)
    words = ("distributed.reduction=exact", "train.on_nonfinite=skip", "train.global_batch_size=64", "train.epochs=2")
    kept = []
    for ranks in (1, 2):
        run_ranks(ranks, script, *SETTINGS, *words, f"run.dir={tmp_path / str(ranks)}").succeeded()
        run = tmp_path / str(ranks) / "run"
        assert json.loads((run / "summary.json").read_text())["skipped_steps"] == 2
        kept.append(newest_weights(run))
    assert all((a == b).all() for a, b in zip(*kept, strict=True))


def newest_weights(run: Path):
    from distlenet.checkpoint.format import load_checkpoint
    from distlenet.checkpoint.store import CheckpointStore

    newest = CheckpointStore(run / "checkpoints", keep_last=1).newest()
    return list(load_checkpoint(newest)["model"].values())
