"""The exponential moving average of the weights."""

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from distlenet.checkpoint.format import State
from distlenet.utils.structure import check_same_structure


class WeightAverage:
    """The average of a model's parameters over the steps, in float32 at least; the buffers are those of the model.

    The arithmetic is that of ``torch.optim.swa_utils.AveragedModel``, which itself has a host sync in each update.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start from the current parameters of ``model``."""
        self.model = model
        self.averaged_model = copy.deepcopy(model).requires_grad_(False)
        averages = (parameter.detach() for parameter in self.averaged_model.parameters())
        self.averages = [average if average.element_size() >= 4 else average.float() for average in averages]
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def reset(self) -> None:
        """Start again from the current parameters of the model."""
        for average, parameter in zip(self.averages, self.model.parameters(), strict=True):
            average.copy_(parameter)

    def update(self) -> None:
        """Add the parameters after a step. No host sync."""
        pairs = zip(self.averages, self.model.parameters(), strict=True)
        parameters = [parameter.detach().to(average.dtype) for average, parameter in pairs]
        self._average(self.averages, parameters, 0)

    @torch.no_grad()
    def evaluated_model(self) -> nn.Module:
        """Return the model with the averaged parameters, the same module in each call. Do not train it."""
        for parameter, average in zip(self.averaged_model.parameters(), self.averages, strict=True):
            if parameter.dtype != average.dtype:  # otherwise they are one tensor
                parameter.copy_(average)
        for target, source in zip(self.averaged_model.modules(), self.model.modules(), strict=True):
            target._buffers.update(source._buffers)  # the same tensors: a forward pass may have replaced one
        return self.averaged_model

    def state_dict(self) -> State:
        """Return averages and buffers, with the names of the model's state."""
        return {**self.model.state_dict(), **self._averages_by_name()}

    @torch.no_grad()
    def load_state_dict(self, state: State) -> None:
        """Load saved averages. Raise ValueError if they do not fit."""
        check_same_structure(state, self.state_dict(), "ema")
        for name, average in self._averages_by_name().items():
            average.copy_(state[name])

    def _averages_by_name(self) -> dict[str, Tensor]:
        """Return the averages by the names of the model's state, in which a shared parameter has several."""
        averages = {id(p): average for p, average in zip(self.model.parameters(), self.averages, strict=True)}
        named = self.model.state_dict(keep_vars=True).items()
        return {name: averages[id(value)] for name, value in named if id(value) in averages}
