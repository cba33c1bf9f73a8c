"""The parameter groups that a task returns for its optimizer."""

from collections import Counter
from typing import Any

from torch import nn

from distlenet.task import Task
from distlenet.utils.errors import UserError

Group = dict[str, Any]
"""Parameters under ``params``, and the settings of the optimizer that differ for them."""


def parameter_groups(task: Task, model: nn.Module) -> list[Group]:
    """Return the groups of ``task``. Raise UserError unless they hold each trainable parameter of ``model`` once."""
    name = f"{type(task).__name__}.parameter_groups"
    groups = task.parameter_groups(model)
    if not isinstance(groups, list) or not all(isinstance(group, dict) and "params" in group for group in groups):
        raise UserError(f"{name}: expected a list of dicts with params; return for example super().parameter_groups")
    groups = [{**group, "params": list(group["params"])} for group in groups]
    counts = Counter(id(parameter) for group in groups for parameter in group["params"])
    for parameter_name, parameter in model.named_parameters():
        count = counts.pop(id(parameter), 0)
        if count > 1 or (count == 0 and parameter.requires_grad):
            groups_of_it = f"in {count} places" if count else "in no group"
            raise UserError(f"{name}: {parameter_name} is {groups_of_it}; each trainable parameter belongs to one")
    if counts:
        raise UserError(f"{name}: has {counts.total()} parameters that are not of the model; give the model's only")
    return [group for group in groups if group["params"]]
