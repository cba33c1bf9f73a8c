"""Train twice with each of some settings, with eager steps and with replayed ones; print what differs as JSON lines."""

import json
import os
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import torch
from torch import nn

from distlenet.config.loading import load_config
from distlenet.distributed.context import init_distributed
from distlenet.distributed.environment import read_environment
from distlenet.distributed.preemption import Preemption
from distlenet.distributed.rendezvous import open_store, register
from distlenet.tasks.image_classification import ImageClassification
from distlenet.tracking.base import Tracker, Trackers
from distlenet.training.trainer import Trainer
from fake_cuda import runtime

SETTINGS = (
    "data.name=synthetic",
    "data.synthetic_train=173",
    "data.synthetic_test=50",
    "device=cuda",
    "train.epochs=3",  # 18 steps; the last of an epoch has 13 samples
    "train.global_batch_size=32",
    "train.log_every=5",  # with the norm of the gradient: another graph
    "optim.lr=0.01",
    "checkpoint.resume=never",
)


class DropoutAndBatchNorm(ImageClassification):
    def model(self):
        layers = (nn.Flatten(), nn.Linear(784, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 10))
        return nn.Sequential(*layers)


class Large(ImageClassification):
    """Gradients of more than 1 MiB: DistributedDataParallel."""

    def model(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 10))


class Groups(ImageClassification):
    def parameter_groups(self, model):
        named = list(model.named_parameters())
        return [
            {"params": [p for name, p in named if "fc" not in name]},
            {"params": [p for name, p in named if "fc" in name], "lr": 0.003, "weight_decay": 0.0},
        ]


class Weighted(ImageClassification):
    """Draws random numbers in the evaluation."""

    def loss(self, model, data):
        losses, logits = super().loss(model, data)
        losses = nn.functional.dropout(losses, training=not model.training)
        return (losses, 1.0 + data[1] % 3), logits


CASES = {
    "fp32": (ImageClassification, "precision=fp32"),
    "bf16": (ImageClassification, "precision=bf16", "optim.name=adamw", "data.augment=flip_shift"),
    "exact": (ImageClassification, "distributed.reduction=exact", "train.max_grad_norm=1", "train.ema_decay=0.9"),
    "streamed": (ImageClassification, "data.device=cpu", "train.accumulation_steps=2", "precision=fp32"),
    "mixed": (ImageClassification, "data.mixup=0.2", "data.cutmix=1", "data.validation=0.03"),
    "augmented": (
        ImageClassification,
        "data.augment=shift",
        "data.crop=28",
        "data.flip=0.5",
        "data.brightness=0.4",
        "data.contrast=0.4",
        "data.erase=0.5",
    ),
    "dropout": (DropoutAndBatchNorm, "train.accumulation_steps=2", "precision=fp32"),
    "dropout, exact": (DropoutAndBatchNorm, "distributed.reduction=exact", "distributed.virtual_shards=2"),
    "large": (Large, "train.accumulation_steps=2"),
    "compressed": (ImageClassification, "distributed.gradient_compression=bf16"),
    "groups": (Groups, "optim.name=adamw", "optim.schedule=cosine"),
    "weighted": (Weighted, "precision=fp32"),
    "uneven": (
        DropoutAndBatchNorm,
        "distributed.reduction=exact",
        "distributed.virtual_shards=3",
        "distributed.allow_uneven_batches=true",
        "train.global_batch_size=30",
    ),
}


class Records(Tracker):
    """Keeps the records without times."""

    def __init__(self):
        self.losses = []
        self.timed = []  # whether records have the times of ranks

    def log(self, record):
        self.losses.append([record["split"], record["step"], record["loss"], record.get("grad_norm")])
        if record["split"] == "train":
            self.timed.append({"compute", "wait", "slowest_rank"} <= record.keys())


def train(store, run_dir, task_class, *words):
    """Return the final weights, the records, the types of settings, and the numbers of captures and replays."""
    (run_dir / "checkpoints").mkdir(parents=True)
    config = load_config([], [*SETTINGS, *words, f"run.dir={run_dir}"])
    records = Records()
    runtime.reset()
    with (
        init_distributed(config, store=store) as context,
        closing(Trainer(config, context, task_class(config), run_dir, Trackers([records]), Preemption(1.0))) as trainer,
    ):
        trainer.fit()
        step = trainer.train_step.on_device
        state = {name: value.cpu() for name, value in step.evaluated_model().state_dict().items()}
        groups = step.optimizer.param_groups
    counts = runtime.counts()
    settings = [(type(group["lr"]).__name__, group.get("capturable")) for group in groups]
    return state, records.losses, settings, counts.get("capture", 0), counts.get("graph launch", 0), records.timed


def main():
    env = read_environment(os.environ)
    store = open_store(env, 60.0)  # one for all runs: each registers in it
    for name in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as directory:
            eager, replayed = (
                train(
                    register(store, env, 60.0, "time limit"),
                    Path(directory) / graph,
                    *CASES[name],
                    f"train.cuda_graph={graph}",
                )
                for graph in ("off", "auto")
            )
        row = {
            "case": name,
            "different": [key for key, value in eager[0].items() if not torch.equal(value, replayed[0][key])],
            "records_equal": eager[1] == replayed[1],
            "settings_equal": eager[2] == replayed[2],
            "captures": [eager[3], replayed[3]],
            "replays": [eager[4], replayed[4]],
            "records": replayed[1],
            "timed": replayed[5],
        }
        print(json.dumps(row) + "\n", end="", flush=True)


if __name__ == "__main__":
    main()
