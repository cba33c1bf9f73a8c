"""The gradients of parameters, as reducers read them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distlenet.utils.errors import UserError

UNUSED = (
    "DistributedDataParallel waits for their gradients; give distributed.find_unused_parameters=true, or exclude them "
    "with requires_grad_(False)"
)


def fill_unused(parameters: Mapping[str, nn.Parameter], allowed: bool) -> None:
    """Give parameters without a gradient one of 0. Raise UserError if these are not ``allowed``."""
    unused = [name for name, parameter in parameters.items() if parameter.grad is None]
    if unused and not allowed:
        raise UserError(f"the loss does not depend on {', '.join(unused)}: {UNUSED}")
    for name in unused:
        parameters[name].grad = torch.zeros_like(parameters[name])


def in_memory_order(parameter: Tensor) -> Tensor:
    """View a parameter's gradient, or zeros, as (number of elements,), in the memory order of the parameter."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    if gradient.stride() != parameter.stride():
        gradient = torch.empty_like(parameter).copy_(gradient)
    return gradient.as_strided((gradient.numel(),), (1,))
