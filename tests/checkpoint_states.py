"""States of checkpoints for tests."""

import torch

from distlenet.config.loading import load_config
from distlenet.models.lenet import Net


def lenet_state(step: int, *overrides: str, model: torch.nn.Module | None = None) -> dict:
    """Return the parts of a state that every checkpoint has, with the weights of ``model`` or of a new ``Net``."""
    weights = (model or Net()).state_dict()
    return {"model": weights, "step": step, "epoch": 0, "config": load_config([], overrides).to_dict()}


def tiny_state(step: int) -> dict:
    """Return a state with a model of three parameters."""
    return lenet_state(step, model=torch.nn.Linear(2, 1))
