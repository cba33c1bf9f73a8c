"""One rank that trains and saves its weights: ``rank_program.py OUT [--die-...] [key=value]...``.

``OUT/rank0.pt`` and so on hold each rank's own model after training. With ``--die-at STEP`` the last rank kills itself
before that optimizer step, as the out-of-memory killer would; with ``--die-after-records`` rank 0 does so after its
records were written, and before the checkpoint that follows them.
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from distlenet.config.loading import load_config
from distlenet.tasks.image_classification import ImageClassification
from distlenet.train import train
from distlenet.training.trainer import Trainer


class SavingTrainer(Trainer):
    die_at = -1
    die_after_records = False
    out = Path()

    def step(self, batch):
        self.checkpoints.store.wait()  # so that no optional checkpoint is skipped
        if self.state.step == self.die_at:
            dist.barrier()
            if self.env.rank == self.env.world_size - 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().step(batch)

    def log(self, split, metrics, **more):
        super().log(split, metrics, **more)
        if split == "test" and self.die_after_records and self.env.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def fit(self, *arguments):
        summary = super().fit(*arguments)
        torch.save(self.model.state_dict(), self.out / f"rank{self.env.rank}.pt")
        return summary


def main(make_task=ImageClassification) -> None:
    out, *words = sys.argv[1:]
    SavingTrainer.out = Path(out)
    if words and words[0] == "--die-at":
        SavingTrainer.die_at = int(words[1])
        words = words[2:]
    if words and words[0] == "--die-after-records":
        SavingTrainer.die_after_records = True
        words = words[1:]
    train(load_config([], words), make_task, SavingTrainer)


if __name__ == "__main__":
    main()
