"""``model.compile``: the model of a training step, compiled by ``torch.compile``."""

from typing import cast

import torch
from torch import nn

from distlenet.distributed.collectives import raise_on_all_ranks
from distlenet.utils.errors import UserError

BACKEND = "inductor"
MAX_SHAPES = 256
"""Shapes and modes for which one model is compiled: torch then raises an error, instead of running it eagerly."""


def compile_model(model: nn.Module, device: torch.device) -> nn.Module:
    """Return ``model`` compiled, with the same parameters, buffers and mode; ``model`` stays eager. A collective.

    Each shape of a batch has its own kernels (``dynamic=False``) and no kernel is selected by its measured speed:
    otherwise the bits would depend on the shapes that a process has seen before, and on timings, and a resumed run
    would have others. Raise UserError if this machine cannot compile.
    """
    import torch._dynamo  # seconds, only if it is used
    import torch._inductor.config as inductor

    torch._dynamo.config.recompile_limit = MAX_SHAPES
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    inductor.deterministic = True
    with raise_on_all_ranks():
        try:
            torch.compile(_double, dynamic=False, backend=BACKEND)(torch.ones(2, device=device))
        except Exception as error:  # of the compiler, in many types
            reason = str(error).strip().partition("\n")[0][:300]
            raise UserError(
                f"model.compile=true: torch.compile does not work here ({type(error).__name__}: {reason}); install a "
                "C++ compiler such as g++, on a GPU also triton, or give model.compile=false"
            ) from error
    return cast(nn.Module, torch.compile(model, dynamic=False, backend=BACKEND))


def _double(values: torch.Tensor) -> torch.Tensor:
    return values * 2
