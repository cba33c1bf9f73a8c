"""Take steps with and without the ledger, ``FILE DIRECTORY``; print how often the host waited for the device."""

import sys
from contextlib import closing
from pathlib import Path

from distlenet.config.loading import load_config
from distlenet.distributed.context import init_distributed
from distlenet.distributed.preemption import Preemption
from distlenet.tasks.registry import make_task
from distlenet.tracking.base import Trackers
from distlenet.training.trainer import Trainer
from fake_cuda import runtime

SETTINGS = ("data.name=digits", "data.device=cuda", "precision=fp32", "train.cuda_graph=off", "train.log_every=1000")


def syncs_of_steps(directory: Path, ledger: bool) -> int:
    config = load_config([], [*SETTINGS, f"data.ledger={ledger}"])
    with (
        init_distributed(config) as context,
        closing(Preemption(1.0)) as preemption,
        closing(Trainer(config, context, make_task(config), directory, Trackers(), preemption)) as trainer,
    ):
        trainer.start()
        for batch in trainer.loader.epoch(0, start=0, stop=6):
            if batch.number == 2:
                runtime.reset()
            trainer.step(batch)
        return runtime.syncs()


for name, ledger in (("without", False), ("with", True)):
    print(syncs_of_steps(Path(sys.argv[1]) / name, ledger))
