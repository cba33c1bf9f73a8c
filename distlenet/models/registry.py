"""Built-in models by the name that ``model.name`` takes."""

import torch
from torch import nn

from distlenet.models.lenet import Net

MODELS: dict[str, type[nn.Module]] = {"lenet": Net}


def make_model(name: str, channels_last: bool, device: torch.device) -> nn.Module:
    """Create a model on ``device`` with weights from torch's global generator.

    ``channels_last`` selects the memory format of convolution weights, and so of their outputs; see
    https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html
    """
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return MODELS[name]().to(device).to(memory_format=memory_format)
