"""The same training, written without this package: one program per peer, started by torchrun.

``torchrun --nproc-per-node=2 benchmarks/peers.py plain --data torchvision --batch 256 --steps 200``: rank 0 prints the
images/s of all ranks after a warm-up, and the seconds until the end of its first step, as JSON. All train distlenet's
Net with the same optimizer and loss on Fashion-MNIST, either with torchvision's dataset and transforms, image by image,
or from tensors prepared in advance. ``limit`` is the bare step: each rank trains on one batch in memory, without
communication; with ``--device cuda`` it replays the step as a CUDA graph.
"""

import argparse
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from distlenet.models.lenet import Net
from distlenet.training.starts import process_age_s

WARM_UP = 30  # steps before the clock starts
MEAN, STD = 0.2860, 0.3530
SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}


@dataclass(frozen=True)
class Compute:
    """Device and precision."""

    device: torch.device
    precision: str

    def autocast(self) -> torch.autocast:
        """Return autocast for the forward pass."""
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "fp32")


class Clock:
    """Count steps, and measure the speed after the warm-up."""

    def __init__(self, batch: int, steps: int) -> None:
        """Measure ``steps`` steps of global batches of ``batch`` images."""
        self.batch, self.steps, self.done, self.started, self.start_s = batch, steps, 0, 0.0, 0.0

    def tick(self) -> bool:
        """Count one step; return whether it was the last."""
        self.done += 1
        if self.done == 1:
            self.start_s = process_age_s()
        if self.done in (WARM_UP, WARM_UP + self.steps) and torch.cuda.is_available():
            torch.cuda.synchronize()
        if self.done == WARM_UP:
            self.started = time.perf_counter()
        return self.done == WARM_UP + self.steps

    def report(self) -> None:
        """Print the speed on rank 0."""
        speed = self.batch * self.steps / (time.perf_counter() - self.started)
        if os.environ["RANK"] == "0":
            print(json.dumps({"images_per_s": speed, "start_s": self.start_s}), flush=True)


def optimizer(net: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of the default recipe."""
    return torch.optim.SGD(net.parameters(), **SGD)


def make_dataset(form: str, directory: Path) -> Dataset[tuple[Tensor, Tensor]]:
    """Return Fashion-MNIST with torchvision's transforms, or as padded and normalised tensors."""
    from torchvision import transforms
    from torchvision.datasets import FashionMNIST

    steps = [transforms.ToTensor(), transforms.Pad(2), transforms.Normalize((MEAN,), (STD,))]
    images: Dataset[tuple[Tensor, Tensor]] = FashionMNIST(directory, transform=transforms.Compose(steps))
    if form == "torchvision":
        return images
    raw = images.data.float().div(255)  # type: ignore[attr-defined]
    return TensorDataset(F.pad(raw, (2, 2, 2, 2)).sub(MEAN).div(STD).unsqueeze(1), images.targets)  # type: ignore[attr-defined]


def repeat(batches: Iterable[list[Tensor]]) -> Iterator[list[Tensor]]:
    """Yield the batches of one epoch after another."""
    while True:
        yield from batches


def plain(data: Dataset[tuple[Tensor, Tensor]], per_rank: int, workers: int, compute: Compute, clock: Clock) -> None:
    """PyTorch only: DistributedSampler, DataLoader, DistributedDataParallel."""
    cuda = compute.device.type == "cuda"
    dist.init_process_group("nccl" if cuda else "gloo")
    net = DistributedDataParallel(Net().to(compute.device))
    optim = optimizer(net)
    scaler = torch.amp.GradScaler(enabled=compute.precision == "fp16")
    sampler = DistributedSampler(data)
    loader = DataLoader(data, per_rank, sampler=sampler, num_workers=workers, pin_memory=cuda)
    for images, labels in repeat(loader):
        with compute.autocast():
            loss = F.cross_entropy(net(images.to(compute.device)), labels.to(compute.device))
        optim.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optim)
        scaler.update()
        if clock.tick():
            break
    clock.report()
    dist.destroy_process_group()


def accelerate(
    data: Dataset[tuple[Tensor, Tensor]], per_rank: int, workers: int, compute: Compute, clock: Clock
) -> None:
    """Hugging Face Accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=compute.device.type == "cpu", mixed_precision=compute.precision.replace("fp32", "no"))
    net = Net()
    net, optim, loader = accelerator.prepare(
        net, optimizer(net), DataLoader(data, per_rank, shuffle=True, num_workers=workers)
    )
    for images, labels in repeat(loader):
        loss = F.cross_entropy(net(images), labels)
        optim.zero_grad()
        accelerator.backward(loss)
        optim.step()
        if clock.tick():
            break
    clock.report()
    accelerator.end_training()


def lightning(
    data: Dataset[tuple[Tensor, Tensor]], per_rank: int, workers: int, compute: Compute, clock: Clock
) -> None:
    """Lightning's Trainer, without progress bar, logger and checkpoints, as the others."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: list[Tensor]) -> Tensor:
            images, labels = batch
            return F.cross_entropy(self.net(images), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer(self)

        def on_train_batch_end(self, *_: object) -> None:
            if clock.tick():
                clock.report()

    trainer = pl.Trainer(
        accelerator="gpu" if compute.device.type == "cuda" else "cpu",
        precision={"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[compute.precision],
        devices=int(os.environ["WORLD_SIZE"]),
        strategy="ddp",
        max_steps=WARM_UP + clock.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(data, per_rank, shuffle=True, num_workers=workers))


def limit(data: Dataset[tuple[Tensor, Tensor]], per_rank: int, workers: int, compute: Compute, clock: Clock) -> None:  # noqa: ARG001
    """Train on one batch in memory: no loader, no DistributedDataParallel, no all-reduce."""
    cuda = compute.device.type == "cuda"
    net = Net().to(compute.device)
    optim = torch.optim.SGD(net.parameters(), **SGD, fused=cuda)
    images = torch.randn(per_rank, 1, 32, 32, device=compute.device)
    labels = torch.randint(0, 10, (per_rank,), device=compute.device)

    def step() -> None:
        with compute.autocast():
            loss = F.cross_entropy(net(images), labels)
        optim.zero_grad()
        loss.backward()
        optim.step()

    if cuda:  # https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
        torch.cuda.set_stream(torch.cuda.Stream())
        for _ in range(3):
            step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            step()
        step = graph.replay
    while True:
        step()
        if clock.tick():
            break
    clock.report()


PEERS = {program.__name__: program for program in (plain, accelerate, lightning, limit)}


def main() -> None:
    """Run one peer as one rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--data", choices=("torchvision", "tensors"), default="tensors")
    parser.add_argument("--directory", type=Path, default=Path("data"), help="torchvision's root of Fashion-MNIST")
    parser.add_argument("--batch", type=int, default=256, help="images per step over all ranks (256)")
    parser.add_argument("--steps", type=int, default=200, help="measured steps (200)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes per rank (0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(arguments.device, int(os.environ["LOCAL_RANK"]) if arguments.device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    per_rank = arguments.batch // int(os.environ["WORLD_SIZE"])
    data = TensorDataset() if arguments.peer == "limit" else make_dataset(arguments.data, arguments.directory)
    compute, clock = Compute(device, arguments.precision), Clock(arguments.batch, arguments.steps)
    PEERS[arguments.peer](data, per_rank, arguments.workers, compute, clock)


if __name__ == "__main__":
    main()
