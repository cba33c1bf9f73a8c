"""The optimizer: made from the settings, and loaded from a checkpoint."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from distlenet.config.names import create, is_import_name, resolve
from distlenet.config.schema import OptimConfig
from distlenet.training.parameter_groups import Group
from distlenet.training.savable import check_savable, required_arguments
from distlenet.utils.errors import UserError
from distlenet.utils.structure import check_same_structure

BUILT_IN = {"sgd": SGD, "adamw": AdamW}

IMPLEMENTATION = {"foreach", "fused", "capturable", "differentiable"}
"""Settings of a group that choose between kernels, and may differ between machines."""


def make_optimizer(config: OptimConfig, groups: list[Group], loss_scaling: bool = False) -> Optimizer:
    """Return the optimizer of the settings for the parameter groups ``groups``.

    With ``loss_scaling`` SGD is not fused: if the first step is skipped because of an overflow, the fused kernel keeps
    momentum buffers that were never initialised (seen with torch 2.14). Raise UserError if it cannot be made.
    """
    args, function = config.args, resolve("optim.name", config.name, BUILT_IN)
    settings: dict[str, Any] = {"lr": config.lr}
    if not is_import_name(config.name) or "weight_decay" in _argument_names(function):
        settings["weight_decay"] = config.weight_decay
    if config.name == "sgd":
        settings |= {"momentum": config.momentum, "nesterov": config.nesterov}
    if twice := settings.keys() & args.keys():
        raise UserError(f"optim.args.{min(twice)}: give optim.{min(twice)} instead")
    if not is_import_name(config.name):
        fused = not (loss_scaling and config.name == "sgd")
        settings |= {"fused": True} if fused else {"fused": False, "foreach": True}  # fused=False turns both off
    settings |= args
    return create(Optimizer, f"optim.name={config.name}", function, groups, "optim.args", settings)


def check_optimizer(config: OptimConfig, optimizer: Optimizer) -> None:
    """Raise UserError for an optimizer, not built in, that needs more than gradients, or cannot be saved."""
    if not is_import_name(config.name):
        return
    given = f"optim.name={config.name}"
    if needed := required_arguments(optimizer.step):
        raise UserError(
            f"{given}: its step needs {', '.join(needed)}, which computes the loss again, but a step has one gradient; "
            "give another"
        )
    try:
        trial = _after_one_step(config, optimizer)
    except Exception as error:  # of the user's code
        raise UserError(f"{given}: a trial step failed: {type(error).__name__}: {error}; give another") from error
    check_savable(given, trial)


def _after_one_step(config: OptimConfig, optimizer: Optimizer, loss_scaling: bool = False) -> dict[str, Any]:
    """Return the state of an optimizer with the same groups, after one step on copies of the parameters."""
    groups = copy.deepcopy(optimizer.param_groups)
    for parameter in (parameter for group in groups for parameter in group["params"] if parameter.requires_grad):
        parameter.grad = torch.ones_like(parameter)
    trial = make_optimizer(config, groups, loss_scaling)
    trial.step()
    return trial.state_dict()


def check_optimizer_state(config: OptimConfig, optimizer: Optimizer, loss_scaling: bool, state: dict[str, Any]) -> None:
    """Raise KeyError or ValueError if ``optimizer`` and its schedule cannot resume from a checkpoint's ``state``."""
    saved, expected = state["optimizer"], _after_one_step(config, optimizer, loss_scaling)
    if not is_import_name(config.name):
        if saved["state"]:  # empty if every step was skipped
            check_same_structure(saved["state"], expected["state"], "optimizer.state")
    else:
        _check_tensors(saved["state"], expected["state"], "optimizer.state")
    # Only the parameters of the groups: their settings are those of this run, and their names depend on the version.
    saved_params = [group["params"] for group in saved["param_groups"]]
    if repr(saved_params) != repr([group["params"] for group in expected["param_groups"]]):  # a tensor of 0 equals 0
        raise ValueError(f"optimizer.param_groups are of the parameters {str(saved_params)[:60]}")
    if not is_import_name(config.schedule):
        counts = {"last_epoch": 0, "_step_count": 0}
        check_same_structure({name: state["schedule"][name] for name in counts}, counts, "schedule")


def _check_tensors(saved: Any, expected: Any, name: str) -> None:
    """Raise ValueError if a tensor of ``saved`` has another shape or dtype than its counterpart, if there is one.

    An optimizer that is not built in may create parts of its state after its first step.
    """
    if isinstance(expected, dict) and isinstance(saved, dict):
        for key in expected.keys() & saved.keys():
            _check_tensors(saved[key], expected[key], f"{name}.{key}")
    elif isinstance(expected, dict) or (isinstance(expected, Tensor) and isinstance(saved, Tensor)):
        check_same_structure(saved, expected, name)


def load_optimizer(config: OptimConfig, optimizer: Optimizer, schedule: LRScheduler, state: dict[str, Any]) -> None:
    """Load the state of optimizer and schedule, but keep the settings of this run.

    torch also loads the saved settings. They differ only if ``checkpoint.allow_changed`` names them. What an optimizer
    that is not built in keeps in its groups, besides its arguments, is state. A schedule that is not built in may
    change everything in the groups: then all of it is state.
    """
    own = [dict(group) for group in optimizer.param_groups]
    peak_lrs = schedule.base_lrs
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        if is_import_name(config.schedule):
            kept = settings.keys() & IMPLEMENTATION
        elif is_import_name(config.name):
            kept = settings.keys() & {*_argument_names(type(optimizer)), "initial_lr"}
        else:
            kept = settings.keys() - {"params"}
        group.update({key: settings[key] for key in kept})
    if isinstance(schedule, LambdaLR) and not is_import_name(config.schedule):
        schedule.base_lrs = peak_lrs
        for group, peak_lr, factor in zip(optimizer.param_groups, peak_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = peak_lr * factor(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in optimizer.param_groups]


def _argument_names(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters) - {"params"}
