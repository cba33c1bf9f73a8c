"""The gradients of parameters, as reducers read them."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from distlenet.utils.errors import UserError

UNUSED = (
    "each step must give every trainable parameter a gradient; give distributed.find_unused_parameters=true, or "
    "exclude them with requires_grad_(False)"
)


class MeanFactors(dict[tuple[int, torch.dtype], Tensor]):
    """1 / size of the global batch, by size and dtype: the gradient of the mean loss in the sum of the losses."""

    def __init__(self, device: torch.device) -> None:
        """Keep the factors on ``device``."""
        super().__init__()
        self.device = device

    def __missing__(self, key: tuple[int, torch.dtype]) -> Tensor:
        """Make the factor of a size, at its first use."""
        global_size, dtype = key
        self[key] = torch.full((), 1 / global_size, dtype=dtype, device=self.device)
        return self[key]


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


def group_by_size(parameters: Iterable[nn.Parameter], limit: int) -> Iterator[list[nn.Parameter]]:
    """Yield consecutive parameters, as many as have ``limit`` elements together; a larger one is alone."""
    group: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if group and size + parameter.numel() > limit:
            yield group
            group, size = [], 0
        group.append(parameter)
        size += parameter.numel()
    yield group
