"""The optimizer and its learning-rate schedule, stepped once per optimizer step."""

import copy
import math
from functools import partial
from typing import Any

import torch
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from distlenet.config.schema import OptimConfig
from distlenet.training.parameter_groups import Group
from distlenet.utils.structure import check_same_structure


def make_optimizer(config: OptimConfig, groups: list[Group], loss_scaling: bool = False) -> Optimizer:
    """Return SGD or AdamW (with PyTorch's betas) for the parameter groups ``groups``.

    With ``loss_scaling`` SGD is not fused: if the first step is skipped because of an overflow, the fused kernel keeps
    momentum buffers that were never initialised (seen with torch 2.15).
    """
    if config.name == "adamw":
        return AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    return SGD(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=not loss_scaling,
    )


def make_schedule(config: OptimConfig, optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """Return the schedule for ``total_steps`` optimizer steps; see ``lr_factor``."""
    if config.warmup_steps is None:
        warmup = int(0.3 * total_steps) if config.schedule == "one_cycle" else 0
    else:
        warmup = config.warmup_steps
    return LambdaLR(optimizer, partial(lr_factor, config.schedule, warmup, total_steps))


def lr_factor(schedule: str, warmup: int, total_steps: int, step: int) -> float:
    """Return the learning rate of optimizer step ``step`` (from 0), as a fraction of the peak.

    constant: 1, after a linear rise over ``warmup`` steps. cosine: the same rise, then half a cosine to 0 (Loshchilov &
    Hutter, https://arxiv.org/abs/1608.03983). one_cycle: half a cosine from 1/25 to 1, then half a cosine to 4e-6
    (Smith & Topin, https://arxiv.org/abs/1708.07120, with the constants of ``torch.optim.lr_scheduler.OneCycleLR``).
    """
    if schedule == "one_cycle":
        low, end = 1 / 25, 1 / 25 / 1e4
        if step < warmup:
            return _half_cosine(low, 1.0, step / warmup)
        return _half_cosine(1.0, end, (step - warmup) / max(1, total_steps - 1 - warmup))
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "cosine":
        return _half_cosine(1.0, 0.0, (step - warmup) / max(1, total_steps - warmup))
    return 1.0


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def check_optimizer_state(config: OptimConfig, optimizer: Optimizer, loss_scaling: bool, state: dict[str, Any]) -> None:
    """Raise KeyError or ValueError if ``optimizer`` and its schedule cannot resume from a checkpoint's ``state``."""
    trial_groups = copy.deepcopy(optimizer.param_groups)
    for parameter in (parameter for group in trial_groups for parameter in group["params"] if parameter.requires_grad):
        parameter.grad = torch.zeros_like(parameter)
    trial = make_optimizer(config, trial_groups, loss_scaling)
    trial.step()  # creates the state of the optimizer
    saved, expected = state["optimizer"], trial.state_dict()
    if saved["state"]:  # empty if every step was skipped
        check_same_structure(saved["state"], expected["state"], "optimizer.state")
    # Only the parameters of the groups: load_optimizer ignores the saved settings, whose names depend on the version.
    saved_params = [group["params"] for group in saved["param_groups"]]
    if repr(saved_params) != repr([group["params"] for group in expected["param_groups"]]):  # a tensor of 0 equals 0
        raise ValueError(f"optimizer.param_groups are of the parameters {str(saved_params)[:60]}")
    counts = {"last_epoch": 0, "_step_count": 0}
    check_same_structure({name: state["schedule"][name] for name in counts}, counts, "schedule")


def load_optimizer(optimizer: Optimizer, schedule: LambdaLR, state: dict[str, Any]) -> None:
    """Load the state of optimizer and schedule, but keep the settings of this run.

    torch also loads the saved settings. They differ only if ``checkpoint.allow_changed`` names them.
    """
    settings = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    peak_lrs = schedule.base_lrs
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    schedule.base_lrs = peak_lrs
    groups = zip(optimizer.param_groups, settings, peak_lrs, schedule.lr_lambdas, strict=True)
    for group, group_settings, peak_lr, factor in groups:
        group.update(group_settings, lr=peak_lr * factor(schedule.last_epoch))
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
