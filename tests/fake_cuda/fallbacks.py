"""Steps that are not captured: those of some tasks; and, as a program, an NCCL that cannot be captured."""

import gc
import random

import torch
import torch.distributed as dist
from torch import nn

from distlenet.distributed.entry_point import run_entry
from distlenet.tasks.image_classification import ImageClassification
from distlenet.train import main


class DrawsOnHost(ImageClassification):
    """Leaves half of the losses out."""

    def loss(self, model, data):
        losses, logits = super().loss(model, data)
        return (losses * (random.random() < 0.5) if model.training else losses), logits


class CountingNet(nn.Module):
    """Its outputs depend on the number of calls."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1024, 10)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls = self.calls + 1
        return self.linear(x.flatten(1)) * self.calls


class ReplacesBuffer(ImageClassification):
    def model(self):
        gc.disable()  # a graph that only a collection of cycles releases, outlives its communicators
        return CountingNet()


class Unused(ImageClassification):
    """Does not use 1.4 MB of its parameters: too many for the flat reducer."""

    def model(self):
        model = super().model()
        model.unused = nn.Linear(600, 600)
        return model


def train_without_capture_of_nccl() -> None:
    """Let NCCL fail in a capture, as ``dist.all_reduce`` reports it."""
    all_reduce = dist.all_reduce

    def all_reduce_unless_capturing(*args, **kwargs):
        if torch.cuda.is_current_stream_capturing():
            raise dist.DistBackendError("NCCL error: unhandled cuda error")
        return all_reduce(*args, **kwargs)

    dist.all_reduce = all_reduce_unless_capturing
    main()


if __name__ == "__main__":
    run_entry(train_without_capture_of_nccl)
