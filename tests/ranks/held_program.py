"""``python -m distlenet.train`` that waits for a test: ``held_program.py DIRECTORY STEP,STEP... [key=value]...``.

Before each of these steps it waits for the file ``DIRECTORY/released-STEP``, so that a run cannot end before the test
has disturbed it, however slow the test is. A stop request releases it, too.
"""

from distlenet.utils.process import exit_with_agent
from distlenet.utils.startup import exit_on_stop_request

if __name__ == "__main__":  # as ``-m distlenet.train``, before the imports that take seconds
    exit_with_agent()
    exit_on_stop_request()

import sys
import time
from pathlib import Path

from distlenet.distributed.entry_point import run_entry
from distlenet.train import main
from distlenet.training.trainer import Trainer


class HeldTrainer(Trainer):
    directory = Path()
    steps: tuple[int, ...] = ()

    def step(self, batch):
        released = self.directory / f"released-{self.state.step}"
        while self.state.step in self.steps and not released.exists():
            if self.preemption.stop_requested:
                released.touch()  # for all ranks: they stop together
            time.sleep(0.01)
        return super().step(batch)


if __name__ == "__main__":
    HeldTrainer.directory = Path(sys.argv.pop(1))
    HeldTrainer.steps = tuple(map(int, sys.argv.pop(1).split(",")))
    run_entry(lambda: main(trainer_class=HeldTrainer))
