"""Two references for the ELBO: independent pixels, and the same network in plain PyTorch.

``python baseline.py [key=value]...`` reads config.yaml and the settings.
"""

import sys

import torch
import torch.nn.functional as F
from vae import Vae

from distlenet import load_config


def independent_pixels(train: torch.Tensor, test: torch.Tensor) -> float:
    """Return the cross-entropy of an image, in nats, if the only model is the mean of each pixel."""
    mean = train.double().mean(0).clamp(1e-4, 1 - 1e-4).expand(test.shape)
    return float(F.binary_cross_entropy(mean, test.double(), reduction="sum")) / len(test)


def plain_pytorch(task: Vae, train: torch.Tensor, test: torch.Tensor) -> float:
    """Return the negative ELBO of the test set after a training with random numbers of torch's generator."""
    torch.manual_seed(0)
    model, settings, peak = task.model(), task.config.train, task.config.optim.lr
    steps = settings.epochs * -(-len(train) // settings.global_batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, cycle_momentum=False)
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(train)).split(settings.global_batch_size):
            losses, _ = task.loss(model, (train[rows], torch.randn(len(rows), task.code)))
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        noise = torch.randn(len(test), task.code)
        parts = zip(test.split(1000), noise.split(1000), strict=True)
        return float(torch.cat([task.loss(model, part)[0] for part in parts]).double().mean())


def main() -> None:
    config = load_config(["config.yaml"], sys.argv[1:])
    task = Vae(config, **config.task.args)
    datasets = task.datasets()
    train, test = (data.get_batch(torch.arange(len(data)))[0] / 255 for data in (datasets.train, datasets.test))
    print(f"independent pixels: {independent_pixels(train, test):.2f} nats", flush=True)
    print(f"plain PyTorch: {plain_pytorch(task, train, test):.2f} nats")


if __name__ == "__main__":
    main()
