"""Weights in a safetensors file. A tensor that several layers share is stored once."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

TIED = "tied"


def write_weights(model: nn.Module, file: Path, metadata: Mapping[str, str]) -> None:
    """Write all parameters and buffers; ``metadata``, and the names of shared tensors, are strings of the header."""
    from safetensors.torch import save

    tensors, tied = {}, {}
    first_names: dict[Any, str] = {}  # by place in memory
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        same = first_names.setdefault(place, name) if tensor.numel() else name
        if same == name:
            tensors[name] = tensor.detach().contiguous().clone()
        else:
            tied[name] = same
    file.write_bytes(save(tensors, {**metadata, TIED: json.dumps(tied)}))


def tied_names(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return {name: name of the stored tensor with the same values} of a header."""
    names: dict[str, str] = json.loads(metadata[TIED])
    return names
