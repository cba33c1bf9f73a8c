"""Two references for the ELBO: independent pixels, and the same network in plain PyTorch.

``python baseline.py [EPOCHS]`` reads the data set of ``data.name`` as the example does.
"""

import sys

import torch
import torch.nn.functional as F
from vae import Vae

from distlenet import load_config

BATCH_SIZE, PEAK_RATE = 128, 0.002


def independent_pixels(train: torch.Tensor, test: torch.Tensor) -> float:
    """Return the cross-entropy of an image, in nats, if the only model is the mean of each pixel."""
    mean = train.double().mean(0).clamp(1e-4, 1 - 1e-4).expand(test.shape)
    return float(F.binary_cross_entropy(mean, test.double(), reduction="sum")) / len(test)


def plain_pytorch(task: Vae, train: torch.Tensor, test: torch.Tensor, epochs: int) -> float:
    """Return the negative ELBO of the test set after a training with random numbers of torch's generator."""
    torch.manual_seed(0)
    model = task.model()
    steps = epochs * -(-len(train) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps, cycle_momentum=False)
    for _ in range(epochs):
        for rows in torch.randperm(len(train)).split(BATCH_SIZE):
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
    task = Vae(load_config(["config.yaml"]), code=20, hidden=400)
    datasets = task.datasets()
    train, test = (data.get_batch(torch.arange(len(data)))[0] / 255 for data in (datasets.train, datasets.test))
    print(f"independent pixels: {independent_pixels(train, test):.2f} nats")
    epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    print(f"plain PyTorch, {epochs} epochs: {plain_pytorch(task, train, test, epochs):.2f} nats")


if __name__ == "__main__":
    main()
