"""Time per step for other networks, compared with the loop by hand and Lightning, in turns in the same processes.

``python benchmarks/networks.py [--ranks 2] [--rounds 10] [--only resnet] [--steps 4]``. By hand: plain
DistributedDataParallel, and a DataLoader on prepared tensors; Lightning: its Trainer with ``ddp`` and the same tensors,
without logger, checkpoints and progress bar. In each round, each way takes some steps, in turn; ratios of the times are
computed within a round, and the table has their median and range. With ``exact``, each rank has one virtual shard. The
images and tokens are random: only the time matters. An epoch has eight steps.

Lightning owns its loop. Therefore the others take their turns in its hook at the end of a step, and a step of Lightning
lasts from one call of this hook to the next.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from distlenet.config.loading import load_config
from distlenet.config.schema import Config
from distlenet.distributed.context import DistributedContext, init_distributed
from distlenet.distributed.preemption import Preemption
from distlenet.task import Datasets, Task
from distlenet.tracking.base import Trackers
from distlenet.training.trainer import Trainer

CLASSES, VOCABULARY, LENGTH, WIDTH = 10, 1000, 64, 128
LIGHTNING = "Lightning, ddp"
SGD = {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "fused": True}


class Transformer(nn.Module):
    """Classify sequences of tokens: (n, LENGTH) to (n, CLASSES)."""

    def __init__(self) -> None:
        """Make 4 layers of width WIDTH, without dropout."""
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.head(self.layers(self.embedding(tokens)).mean(1))
        return logits


def resnet() -> nn.Module:
    """Return ResNet-18."""
    return torchvision.models.resnet18(num_classes=CLASSES)  # type: ignore[no-any-return]


def images(size: int, samples: int) -> Tensor:
    """Return random images."""
    return torch.randn(samples, 3, size, size)


@dataclass(frozen=True)
class Case:
    """A network with its inputs, and its global batch."""

    model: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]  # from the number of samples
    batch: int

    def data(self) -> TensorDataset:
        """Return eight global batches."""
        samples = 8 * self.batch
        return TensorDataset(self.inputs(samples), torch.arange(samples) % CLASSES)


CASES = {
    "resnet18, 32×32": Case(resnet, lambda samples: images(32, samples), 64),
    "resnet18, 224×224": Case(resnet, lambda samples: images(224, samples), 16),
    "transformer": Case(Transformer, lambda samples: torch.randint(VOCABULARY, (samples, LENGTH)), 64),
}


class InMemory:
    """Tensors of which one operation selects a batch."""

    def __init__(self, data: TensorDataset) -> None:
        """Take the tensors of ``data``."""
        self.tensors = data.tensors

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.tensors[0])

    def get_batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Return the samples at ``indices``."""
        return tuple(tensor.index_select(0, indices) for tensor in self.tensors)


class Classify(Task):
    """The task of a case."""

    def __init__(self, config: Config, case: Case, data: TensorDataset) -> None:
        """Use the network of ``case``, and ``data``."""
        super().__init__(config)
        self.case, self.data = case, InMemory(data)

    def model(self) -> nn.Module:
        """Return the network."""
        return self.case.model()

    def datasets(self) -> Datasets:
        """Return the data, as training and test set."""
        return Datasets(self.data, self.data)

    def loss(self, model: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return cross-entropy and logits."""
        logits = model(data[0])
        return F.cross_entropy(logits, data[1], reduction="none"), logits

    def metrics(self, outputs: Tensor, data: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Return whether each sample is classified correctly."""
        return {"accuracy": outputs.argmax(1) == data[1]}


def by_hand(case: Case, data: TensorDataset, ranks: int) -> Iterator[None]:
    """Take one step per iteration."""
    torch.manual_seed(0)
    net = DistributedDataParallel(case.model())
    optim = torch.optim.SGD(net.parameters(), **SGD)
    sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(data)
    loader = DataLoader(data, case.batch // ranks, sampler=sampler)
    for epoch in count():
        sampler.set_epoch(epoch)
        for inputs, labels in loader:
            loss = F.cross_entropy(net(inputs), labels)
            optim.zero_grad()
            loss.backward()
            optim.step()
            yield


def ours(case: Case, data: TensorDataset, reduction: str, context: DistributedContext, scratch: Path) -> Iterator[None]:
    """Take one step per iteration, with metrics and all checks."""
    ranks = context.env.world_size
    shards = f"distributed.virtual_shards={ranks}"
    words = ["train.epochs=1000000", "optim.lr=0.01", f"train.global_batch_size={case.batch}", shards]
    config = load_config([], [*words, f"distributed.reduction={reduction}"])
    trainer = Trainer(config, context, Classify(config, case, data), scratch, Trackers([]), Preemption(25))
    trainer.train_step.warm_up()
    try:
        for epoch in count():
            for batch in trainer.loader.epoch(epoch):
                trainer.step(batch)
                yield
    finally:
        trainer.close()


def lightning(case: Case, data: TensorDataset, ranks: int, max_steps: int, turns: Iterator[None]) -> None:
    """Take ``max_steps`` steps with Lightning; after each, continue ``turns``."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = case.model()

        def training_step(self, batch: list[Tensor]) -> Tensor:
            inputs, labels = batch
            return F.cross_entropy(self.net(inputs), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.net.parameters(), **SGD)

        def on_train_batch_end(self, *_: object) -> None:
            next(turns, None)

    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp",
        max_epochs=-1,
        max_steps=max_steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(data, case.batch // ranks, shuffle=True))  # it adds a DistributedSampler


def take_turns(
    ways: dict[str, Iterator[None]], rounds: int, steps: int, seconds: dict[str, list[float]]
) -> Iterator[None]:
    """Append the time per step of each way in each round to ``seconds``. Yield for each step of Lightning."""
    names = list(seconds)
    for number in range(rounds):
        turn = number % len(names)
        for way in (*names[turn:], *names[:turn]):
            started = 0.0
            for step in range(steps + 1):
                if step == 1:  # the first warms the caches, which hold the data of another way
                    started = time.perf_counter()
                if way == LIGHTNING:
                    yield
                else:
                    next(ways[way])
            seconds[way].append((time.perf_counter() - started) / steps)


def measure(name: str, rounds: int, steps: int) -> None:
    """Measure a case as one rank; rank 0 prints its rows."""
    case = CASES[name]
    torch.manual_seed(1)
    data = case.data()
    with tempfile.TemporaryDirectory() as scratch, init_distributed(load_config()) as context:
        ranks = context.env.world_size
        ways = {
            "by hand": by_hand(case, data, ranks),
            **{each: ours(case, data, each, context, Path(scratch)) for each in ("ddp", "exact")},
        }
        seconds: dict[str, list[float]] = {way: [] for way in (*ways, LIGHTNING)}
        turns = take_turns(ways, rounds + 1, steps, seconds)
        lightning(case, data, ranks, 1 + (rounds + 1) * (steps + 1), turns)  # the first step starts the turns
        for way in ways.values():
            way.close()  # type: ignore[attr-defined]
        if context.env.rank == 0:
            for label, times in seconds.items():
                ratios = [a / b for a, b in zip(times[1:], seconds["by hand"][1:], strict=True)]  # without a warm-up
                ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
                print(f"| {name} | {label} | {statistics.median(times[1:]) * 1e3:.1f} | {ratio} |", flush=True)


def main() -> None:
    """Measure as one rank, or start the ranks for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks (2)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds (10)")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a way in a round (4)")
    parser.add_argument("--only", default="", metavar="PART", help="only cases with this in their name")
    arguments = parser.parse_args()
    names = [name for name in CASES if arguments.only in name]
    if "RANK" in os.environ:
        measure(names[0], arguments.rounds, arguments.steps)
        return
    print(f"{arguments.ranks} ranks\n\n| network | loop | ms per step | time relative to the loop by hand |")
    print("| --- | --- | ---: | ---: |", flush=True)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.ranks}")
    same = ("--rounds", str(arguments.rounds), "--steps", str(arguments.steps))
    for name in names:
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
        subprocess.run([*launcher, __file__, "--only", name, *same], env=environ, check=True)


if __name__ == "__main__":
    main()
