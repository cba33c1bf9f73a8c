"""Networks by the name that ``model.name`` accepts."""

from collections.abc import Callable

import torch
from torch import nn

from distlenet.config.names import call, resolve
from distlenet.config.schema import ModelConfig
from distlenet.models.lenet import Net
from distlenet.utils.errors import UserError

MODELS: dict[str, Callable[..., nn.Module]] = {"lenet": Net}


def make_model(config: ModelConfig) -> nn.Module:
    """Create a network on the CPU, with weights from torch's global generator.

    ``config.channels_last`` selects the memory format of convolution weights, and so of their outputs; see
    https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html

    Raise UserError if the name cannot be imported, does not accept ``config.args`` or returns no network.
    """
    function = resolve("model.name", config.name, MODELS)
    model = call("model.args", function, config.args)
    if not isinstance(model, nn.Module):
        raise UserError(f"model.name={config.name}: returned a {type(model).__name__}; expected a torch.nn.Module")
    return model.to(memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
