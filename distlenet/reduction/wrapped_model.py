"""The model that DistributedDataParallel wraps: with a stop flag and a sum of weights in its all-reduce."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # see below
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from distlenet.reduction.gradients import UNUSED
from distlenet.reduction.shared_memory import AllReduce
from distlenet.utils.errors import UserError

# DistributedDataParallel imports torch._dynamo when it is first built, and an exception kept from that import (seen
# with torch 2.15) keeps all frames of that moment alive, with the trainer and the process group in them. Imported
# here, it finds no such frames: the group can end when its ``with`` block does.

OPTIONS: dict[str, Any] = {"gradient_as_bucket_view": True}
"""Chosen by measurement: ``benchmarks/reduction_cost.py`` also tries smaller buckets and ``static_graph``."""

PARAMETERS = inspect.signature(DistributedDataParallel).parameters
# Buffers are averaged instead of copied from rank 0. torch 2.14 renames the option.
OPTIONS["forward_sync_buffers" if "forward_sync_buffers" in PARAMETERS else "broadcast_buffers"] = False

CommHook = Callable[[Any, dist.GradBucket], Future[Tensor]]  # type: ignore[name-defined]


def sum_comm_hook(all_reduce: AllReduce) -> CommHook:
    """Return a communication hook that sums a bucket of gradients with ``all_reduce``, without averaging."""

    def hook(_: Any, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        gradients = bucket.buffer()
        all_reduce(gradients)
        done: Future[Tensor] = Future()
        done.set_result(gradients)
        return done

    return hook


NO_SAMPLES = object()
"""Input of the wrapped model on a rank without samples."""


class ModelWithStopFlag(nn.Module):
    """A model and parameters that are always 0: only their gradients matter."""

    def __init__(self, model: nn.Module, device: torch.device, sums_weights: bool, find_unused: bool) -> None:
        super().__init__()
        if find_unused:  # they are not in the graph of the outputs, so they would count as unused
            self._ddp_params_and_buffers_to_ignore = ["flag", "weight", ".flag", ".weight"]
        self.model = model
        self.flag = nn.Parameter(torch.zeros((), device=device))
        self.weight = nn.Parameter(torch.zeros((), device=device)) if sums_weights else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model; for ``NO_SAMPLES``, return 0, with a gradient of 0 for every parameter."""
        if args and args[0] is NO_SAMPLES:
            return zero_of(self.model)
        return self.model(*args, **kwargs)


def zero_of(model: nn.Module) -> Tensor:
    """Return 0, with a gradient of 0 for every parameter."""
    # Times zeros_like, not 0: a gradient has the strides of its parameter, otherwise DistributedDataParallel warns.
    return torch.stack([(p * torch.zeros_like(p)).sum().float() for p in model.parameters() if p.requires_grad]).sum()


class _Wrapper(DistributedDataParallel):
    """Explains the error for a parameter that a micro-batch before did not use."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().forward(*args, **kwargs)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            if "Expected to have finished reduction in the prior iteration" in str(error):
                raise UserError(f"the loss of a micro-batch does not depend on all parameters: {UNUSED}") from error
            raise


def wrap(model: ModelWithStopFlag, find_unused: bool, comm_hook: CommHook | None) -> DistributedDataParallel:
    """Wrap ``model``; ``comm_hook`` replaces the all-reduce. A collective."""
    wrapped = _Wrapper(model, find_unused_parameters=find_unused, **OPTIONS)
    if comm_hook is not None:
        wrapped.register_comm_hook(None, comm_hook)
    return wrapped
