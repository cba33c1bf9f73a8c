"""One rank that trains and leaves its weights behind: ``rank_program.py OUT [--die-...] [key=value]...``.

``OUT/rank0.pt`` and so on hold each rank's own network after training. With ``--die-at STEP``, the last rank kills
itself before that optimizer step, as the out-of-memory killer would; with ``--die-in-evaluation``, rank 0
does after its records were written, and before the checkpoint that follows them.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from distlenet import train as train_entry
from distlenet.config import load_config
from distlenet.trainer import Trainer


class Watched(Trainer):
    die_at = -1
    die_in_evaluation = False
    out = Path()

    def train_step(self, images, labels, indices):
        if self.world.rank == self.world.world_size - 1 and self.step == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        super().train_step(images, labels, indices)

    def evaluate(self):
        best = super().evaluate()
        if self.die_in_evaluation and self.world.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return best

    def fit(self):
        results = super().fit()
        torch.save(self.net.state_dict(), self.out / f"rank{self.world.rank}.pt")
        return results


def main() -> None:
    out, *words = sys.argv[1:]
    Watched.out = Path(out)
    if words and words[0] == "--die-at":
        Watched.die_at = int(words[1])
        words = words[2:]
    if words and words[0] == "--die-in-evaluation":
        Watched.die_in_evaluation = True
        words = words[1:]
    train_entry.Trainer = Watched
    train_entry.train(load_config([], words))


if __name__ == "__main__":
    main()
