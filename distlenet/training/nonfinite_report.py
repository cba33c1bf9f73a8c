"""The report on a step whose loss or gradient is not finite: each rank computes its share again.

The weights are still those from before the step (see ``distlenet.training.step_flags``), so the result is what
happened.
"""

import json
import math
import socket
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from distlenet.distributed.collectives import broadcast_object, gather_on_rank_0
from distlenet.distributed.rendezvous import format_ranks
from distlenet.task import Batch
from distlenet.tracking.base import Record
from distlenet.training.train_step import DIVERGENCE_HINT, TrainStep
from distlenet.utils.errors import UserError, warn
from distlenet.utils.files import replace_text
from distlenet.utils.nested import nonfinite_samples

MAX_SAMPLES = 10
"""Samples of a rank that are listed with their losses, the worst first; samples that a message names."""


def handle_nonfinite(train_step: TrainStep, batch: Batch, step: int, skipped: int, run_dir: Path) -> None:
    """Report what was wrong with optimizer step ``step``, the ``skipped``-th that was skipped. A collective.

    Raise UserError, on every rank, unless ``train.on_nonfinite`` allows to skip the step.
    """
    cause, advice = diagnose(train_step, batch, step, run_dir)
    config = train_step.config.train
    if config.on_nonfinite == "stop":
        raise UserError(f"{cause}; {advice}, or give train.on_nonfinite=skip")
    limit = config.max_skipped_steps
    if skipped > limit:
        raise UserError(f"{cause}; {limit} steps were skipped before (train.max_skipped_steps); {advice}")
    if train_step.context.env.rank == 0:
        warn(f"{cause}; skipped (train.on_nonfinite=skip), {skipped} of at most {limit}")


def diagnose(train_step: TrainStep, batch: Batch, step: int, run_dir: Path) -> tuple[str, str]:
    """Write ``RUN/diagnosis/step-00000012.json`` and return, on every rank, the cause and an advice. A collective.

    Steps count from 1 in the report, from 0 in ``step``.
    """
    ranks = gather_on_rank_0(inspect_rank(train_step, batch, step))  # collective
    cause, advice = "", DIVERGENCE_HINT
    if train_step.context.env.rank == 0:
        path = run_dir / "diagnosis" / f"step-{step + 1:08d}.json"
        cause = f"step {step + 1}: {_describe(ranks)}; see {path}"
        if any(rank["not_finite_data"] for rank in ranks):
            advice = "correct these samples, or what loads them"
        parameters = train_step.on_device.model.named_parameters()
        report = {
            "step": step + 1,
            "epoch": batch.epoch + 1,
            "time": round(time.time(), 3),
            "images": batch.global_size,
            "lr": train_step.on_device.optimizer.param_groups[0]["lr"],
            "precision": train_step.context.precision,
            "loss_scale": train_step.on_device.scaler.get_scale(),
            "not_finite": [name for name, tensor in parameters if not tensor.isfinite().all()],
            "ranks": [rank for rank in ranks if not rank["finite"]] or ranks,
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps(_to_json_values(report), indent=1) + "\n")
        except OSError as error:
            warn(f"{path}: cannot be written: {error.strerror or error}; the diagnosis is lost, give another run.dir")
    return broadcast_object((cause, advice))


def inspect_rank(train_step: TrainStep, batch: Batch, step: int) -> Record:
    """Return losses and gradients of this rank's share of a step, as plain values.

    A collective with ``model.sync_batchnorm``.
    """
    losses, weights, gradients = train_step.on_device.recompute(batch, step)
    # A value that is not finite may also be a mask: list only samples whose loss is not finite either.
    finite = losses.isfinite().tolist()
    bad = [i for i in nonfinite_samples(batch.inputs(train_step.on_device.task)) if not finite[i]]
    samples = [{"index": i, "loss": loss} for i, loss in zip(batch.indices.tolist(), losses.tolist(), strict=True)]
    worst_first = sorted(samples, key=lambda s: math.inf if math.isnan(s["loss"]) else s["loss"], reverse=True)
    rows = [_gradient_row(name, gradient) for name, gradient in gradients.items()]
    total, weighted = (float(len(losses)), losses) if weights is None else (float(weights.sum()), weights * losses)
    return {
        "rank": train_step.context.env.rank,
        "host": socket.gethostname(),
        "finite": bool(losses.isfinite().all()) and math.isfinite(total),
        "loss": sum(weighted.tolist()) / (total or 1.0),
        "weight": total,
        "indices": batch.indices.tolist(),
        "not_finite_data": batch.indices[bad].tolist(),
        "worst": worst_first[:MAX_SAMPLES],
        "gradients": sorted(rows, key=lambda row: (row["not_finite"], row["norm"]), reverse=True),
    }


def _gradient_row(name: str, gradient: Tensor) -> Record:
    return {
        "name": name,
        "norm": float(gradient.norm()),
        "largest": float(gradient.abs().max()),
        "not_finite": int((~gradient.isfinite()).sum()),
    }


def _describe(ranks: list[Record]) -> str:
    if bad := [rank for rank in ranks if not math.isfinite(rank["weight"])]:
        return f"a weight of {format_ranks([rank['rank'] for rank in bad])} is negative or not finite"
    if not any(rank["weight"] for rank in ranks):
        return "the weights of all losses are 0"
    if bad := [rank for rank in ranks if not rank["finite"]]:
        cause = f"the loss of {format_ranks([rank['rank'] for rank in bad])} is not finite (on {bad[0]['host']})"
        samples = [str(index) for rank in ranks for index in rank["not_finite_data"]]
        if not samples:
            return cause
        more = f" and of {len(samples) - MAX_SAMPLES} others" * (len(samples) > MAX_SAMPLES)
        named = f"sample{'s' * (len(samples) > 1)} {', '.join(samples[:MAX_SAMPLES])}{more}"
        return f"{cause}, nor is the input of {named}"
    gradients = [row for rank in ranks for row in rank["gradients"]]
    if names := dict.fromkeys(row["name"] for row in gradients if row["not_finite"]):
        return f"the gradient of {', '.join(names)} is not finite"
    largest = max(gradients, key=lambda row: row["largest"])
    return (
        f"the loss is finite, but the sum of the gradients was not, or too large to be added exactly "
        f"(the largest now, of {largest['name']}, is {largest['largest']:.3g})"
    )


def _to_json_values(value: Any) -> Any:
    """Replace numbers that JSON does not have by strings: nan, inf, -inf."""
    if isinstance(value, dict):
        return {key: _to_json_values(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_json_values(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
