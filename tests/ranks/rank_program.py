"""One rank that trains and leaves its weights behind: ``rank_program.py OUT [--die-...] [key=value]...``.

``OUT/rank0.pt`` and so on hold each rank's own network after training. With ``--die-at STEP``, the last rank kills
itself before that optimizer step, as the out-of-memory killer would; with ``--die-after-records``, rank 0
does after its records were written, and before the checkpoint that follows them.
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from distlenet import train as train_entry
from distlenet.config.loading import load_config
from distlenet.training.trainer import Trainer


class Watched(Trainer):
    die_at = -1
    die_after_records = False
    out = Path()

    def train_step(self, images, labels, indices):
        self.checkpointer.files.wait()  # so that none is left out because another is being written
        if self.at.step == self.die_at:
            dist.barrier()
            if self.env.rank == self.env.world_size - 1:
                os.kill(os.getpid(), signal.SIGKILL)
        super().train_step(images, labels, indices)

    def log(self, split, metrics, **more):
        super().log(split, metrics, **more)
        if split == "test" and self.die_after_records and self.env.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def fit(self):
        results = super().fit()
        torch.save(self.net.state_dict(), self.out / f"rank{self.env.rank}.pt")
        return results


def main() -> None:
    out, *words = sys.argv[1:]
    Watched.out = Path(out)
    if words and words[0] == "--die-at":
        Watched.die_at = int(words[1])
        words = words[2:]
    if words and words[0] == "--die-after-records":
        Watched.die_after_records = True
        words = words[1:]
    train_entry.Trainer = Watched
    train_entry.train(load_config([], words))


if __name__ == "__main__":
    main()
