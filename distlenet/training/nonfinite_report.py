"""What was wrong with a step whose loss or gradient is not finite: each rank computes its share once more, and looks.

The weights are still those before the step (see ``distlenet.training.nonfinite_guard``), so what is found is what happened.
"""

import json
import math
import socket
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from distlenet.data.loader import Batch
from distlenet.distributed.collectives import broadcast_object
from distlenet.distributed.rendezvous import format_ranks
from distlenet.tracking.base import Record
from distlenet.training.state import TrainState
from distlenet.training.train_step import MEND, TrainStep
from distlenet.utils.errors import UserError, warn
from distlenet.utils.files import replace_text

WORST = 10
"""How many images of a rank are listed with their losses, the worst first."""


def stop_or_skip(step: TrainStep, batch: Batch, at: TrainState, number: int, count: int, folder: Path) -> None:
    """Tell what was wrong with optimizer step ``number`` + 1 of the epoch ``at`` which a run is. A collective.

    Raises UserError, on every rank, but where ``train.on_nonfinite`` allows to skip the step; see also ``diagnose``.
    """
    wrong = diagnose(step, batch, at.epoch, number, count, folder)
    train = step.config.train
    if train.on_nonfinite == "stop":
        raise UserError(f"{wrong}; {MEND}, or give train.on_nonfinite=skip")
    at.skipped += 1
    if at.skipped > train.max_skipped_steps:
        raise UserError(
            f"{wrong}; {train.max_skipped_steps} steps were skipped before (train.max_skipped_steps); {MEND}"
        )
    if step.context.env.rank == 0:
        warn(f"{wrong}; skipped (train.on_nonfinite=skip), {at.skipped} of at most {train.max_skipped_steps}")


def diagnose(step: TrainStep, batch: Batch, epoch: int, number: int, count: int, folder: Path) -> str:
    """Write ``RUN/diagnosis/step-00000012.json`` and return, on every rank, what is wrong, in words. A collective.

    ``batch`` is this rank's share of the ``count`` images of optimizer step ``number`` + 1.
    """
    found: list[Record] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, examine(step, batch, epoch, number, count))
    words = ""
    if step.context.env.rank == 0:
        path = folder / "diagnosis" / f"step-{number + 1:08d}.json"
        words = f"step {number + 1}: {_in_words(found)}; look at {path}"
        report = {
            "step": number + 1,
            "epoch": epoch + 1,
            "time": round(time.time(), 3),
            "images": count,
            "lr": step.optimizer.param_groups[0]["lr"],
            "precision": step.context.precision,
            "loss_scale": step.scaler.get_scale(),
            "not_finite": [name for name, tensor in step.net.named_parameters() if not tensor.isfinite().all()],
            "ranks": [rank for rank in found if not rank["finite"]] or found,
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps(_plain(report), indent=1) + "\n")
        except OSError as error:
            warn(f"{path}: cannot be written: {error.strerror or error}; what was found is lost, give another run.dir")
    return broadcast_object(words)


def examine(step: TrainStep, batch: Batch, epoch: int, number: int, count: int) -> Record:
    """Compute this rank's share of a step, change nothing, and return its losses and gradients as plain values."""
    images, labels, indices = batch
    inputs = step.prepare.augmented(images, indices, epoch)
    named = dict(step.net.named_parameters())
    buffers = {name: buffer.clone() for name, buffer in step.net.named_buffers()}
    total = [torch.zeros_like(parameter) for parameter in named.values()]
    losses: list[tuple[float, int, int]] = []
    for shard, (x, y, i) in step.reduction.micro_batches(inputs, labels, indices.to(labels.device)):
        step.seed(number, shard)
        with step.autocast:
            logits = step.net(x).float()
        loss = F.cross_entropy(logits, y, reduction="none", label_smoothing=step.config.train.label_smoothing)
        # Not backward(): that would wake DistributedDataParallel, and the other ranks are elsewhere.
        gradients = torch.autograd.grad(step.scaler.scale(loss.sum() / count), list(named.values()), allow_unused=True)
        for mine, gradient in zip(total, gradients, strict=True):
            if gradient is not None:
                mine.add_(gradient)
        losses += zip(loss.tolist(), i.tolist(), y.tolist(), strict=True)
    for name, buffer in step.net.named_buffers():  # what a BatchNorm counts
        buffer.copy_(buffers[name])
    odd_first = sorted(losses, key=lambda row: math.inf if math.isnan(row[0]) else row[0], reverse=True)
    sizes = [_size(name, gradient) for name, gradient in zip(named, total, strict=True)]
    return {
        "rank": step.context.env.rank,
        "host": socket.gethostname(),
        "finite": all(math.isfinite(loss) for loss, _, _ in losses),
        "loss": sum(loss for loss, _, _ in losses) / max(1, len(losses)),
        "indices": indices.tolist(),
        "worst": [{"index": index, "label": label, "loss": loss} for loss, index, label in odd_first[:WORST]],
        "gradients": sorted(sizes, key=lambda row: (row["not_finite"], row["norm"]), reverse=True),
    }


def _size(name: str, gradient: Tensor) -> Record:
    return {
        "name": name,
        "norm": float(gradient.norm()),
        "largest": float(gradient.abs().max()),
        "not_finite": int((~gradient.isfinite()).sum()),
    }


def _in_words(found: list[Record]) -> str:
    bad = [rank for rank in found if not rank["finite"]]
    if bad:
        return f"the loss of {format_ranks([rank['rank'] for rank in bad])} is not finite (on {bad[0]['host']})"
    names = {row["name"]: None for rank in found for row in rank["gradients"] if row["not_finite"]}
    if names:
        return f"the gradient of {', '.join(names)} is not finite"
    largest = max((row for rank in found for row in rank["gradients"]), key=lambda row: row["largest"])
    return (
        f"the loss is finite, but the sum of the gradients was not, or too large to be added exactly "
        f"(now the largest, of {largest['name']}, is {largest['largest']:.3g})"
    )


def _plain(value: Any) -> Any:
    """Write what JSON has no number for as a text: nan, inf, -inf."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
