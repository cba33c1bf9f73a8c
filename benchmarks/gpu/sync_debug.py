"""Train, and print the places of host syncs between log points: ``sync_debug.py [key=value]...``; JSON on stdout."""

import json
import sys
import warnings
from collections import Counter
from importlib import import_module
from typing import Any

import torch

from distlenet.training.trainer import Trainer

SKIP = 50  # first steps, with captures and allocations

found: Counter[str] = Counter()
watched = 0


def record(message: Any, _category: Any, filename: str, lineno: int, *_: Any) -> None:
    """Count a warning about a sync by its place."""
    if "called a synchronizing CUDA operation" in str(message):
        found[f"{'/'.join(filename.split('/')[-2:])}:{lineno}"] += 1
    else:
        sys.stderr.write(f"{filename}:{lineno}: {message}\n")


class Watched(Trainer):
    """Watch each step and the loading of the next batch, not the log points and the ends of epochs."""

    def step(self, batch: Any) -> Any:
        """Take a step, and watch from here to the next log point."""
        global watched
        if self.state.step >= SKIP:
            torch.cuda.set_sync_debug_mode("warn")
            watched += 1
        result = super().step(batch)
        if self.logs_after(batch) or self.state.batch == self.sampler.steps or self.state.step == self.total_steps:
            torch.cuda.set_sync_debug_mode("default")
        return result

    def check_finite(self) -> None:
        """Allow its host sync, also if it precedes a check of replicas."""
        torch.cuda.set_sync_debug_mode("default")
        super().check_finite()


if __name__ == "__main__":
    warnings.simplefilter("always")
    warnings.showwarning = record
    import_module("distlenet.train").main(trainer_class=Watched)
    print(json.dumps({"steps": watched, "syncs": found}))
