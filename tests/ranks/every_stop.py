"""Stop a run after each of its steps, and resume it in a fresh process: ``every_stop.py DIRECTORY [key=value]...``.

Each process is forked from this one, which has imported everything and computed nothing: as fresh as a new interpreter,
in a tenth of the time. A stop is a SIGKILL after the step's checkpoint. The final checkpoint and the history of every
interrupted run must be bit-identical to those of the uninterrupted one.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

import torch

from distlenet.config.loading import load_config
from distlenet.tracking.base import NONDETERMINISTIC_KEYS
from distlenet.train import train
from distlenet.training.trainer import Trainer


class StoppedTrainer(Trainer):
    stop_after = -1

    def step(self, batch):
        if self.state.step == self.stop_after:
            self.checkpoints.save(self)  # this step's may have been skipped, while another one was written
            assert self.checkpoints.store.wait() is None
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(batch)


def in_fresh_process(directory: Path, words: list[str], stop_after: int) -> int:
    """Train in a forked process; return its wait status."""
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException), (directory.parent / "log.txt").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            try:
                torch.set_num_threads(1)
                StoppedTrainer.stop_after = stop_after
                config = load_config([], [*words, f"run.dir={directory}", "run.name=run"])
                train(config, trainer_class=StoppedTrainer)
                status = 0
            except BaseException:
                traceback.print_exc()
                raise
        os._exit(status)
    return os.waitpid(child, 0)[1]


def result(directory: Path) -> tuple[dict, list[dict]]:
    """Return the last checkpoint's state and the history, without what a clock measured."""
    newest = sorted((directory / "run/checkpoints").glob("step-*.pt"))[-1]
    records = [json.loads(line) for line in (directory / "run/metrics.jsonl").read_text().splitlines()]
    records = [{k: v for k, v in record.items() if k not in NONDETERMINISTIC_KEYS} for record in records]
    state = torch.load(newest, weights_only=True)
    state.pop("config")  # contains this directory
    state.pop("restarts")
    state.pop("run_id")
    return state, records


def differences(a: object, b: object, place: str = "") -> list[str]:
    """Name the entries in which two nested states differ, comparing tensors bit by bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [place]
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [f"{place}.{key}" for key in a.keys() ^ b.keys()]
        return keys + [found for key in a.keys() & b.keys() for found in differences(a[key], b[key], f"{place}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [
            found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in differences(x, y, f"{place}[{i}]")
        ]
    return [] if type(a) is type(b) and a == b else [f"{place}: {a} and {b}"]


def main() -> None:
    directory, words = Path(sys.argv[1]), sys.argv[2:]
    whole = directory / "whole"
    assert in_fresh_process(whole, words, -1) == 0, (directory / "log.txt").read_text()
    wanted = result(whole)
    steps = wanted[0]["step"]
    for step in range(1, steps):
        broken = directory / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        assert in_fresh_process(broken, words, step) == signal.SIGKILL, (directory / "log.txt").read_text()
        assert not (broken / "run/summary.json").exists()
        assert in_fresh_process(broken, words, -1) == 0, (directory / "log.txt").read_text()
        found = differences(list(wanted), list(result(broken)))
        assert not found, f"stopped after step {step}, these differ: {found[:10]}"
    print(f"{steps - 1} stops, all equal")


if __name__ == "__main__":
    main()
