"""The learning-rate schedule, stepped once per optimizer step."""

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from distlenet.config.names import create, is_import_name, resolve
from distlenet.config.schema import OptimConfig
from distlenet.training.savable import check_savable, required_arguments
from distlenet.utils.errors import UserError


def make_schedule(config: OptimConfig, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """Return the schedule for ``total_steps`` optimizer steps, a built-in one (see ``lr_factor``) or one of torch.

    Raise UserError for one that cannot be made, needs a metric, or whose state a checkpoint cannot hold.
    """
    if not is_import_name(config.schedule):
        if config.schedule_args:
            raise UserError(f"optim.schedule_args: optim.schedule={config.schedule} has none; remove them")
        if config.warmup_steps is None:
            warmup = int(0.3 * total_steps) if config.schedule == "one_cycle" else 0
        else:
            warmup = config.warmup_steps
        return LambdaLR(optimizer, partial(lr_factor, config.schedule, warmup, total_steps))
    given = f"optim.schedule={config.schedule}"
    if config.warmup_steps is not None:
        raise UserError(f"optim.warmup_steps={config.warmup_steps}: {given} has no such argument; remove it")
    function = resolve("optim.schedule", config.schedule, {})
    schedule = create(LRScheduler, given, function, optimizer, "optim.schedule_args", config.schedule_args)
    if needed := required_arguments(schedule.step):
        raise UserError(
            f"{given}: its step needs {', '.join(needed)}, but a schedule is stepped after every optimizer step, "
            "without arguments; give another"
        )
    check_savable(given, schedule.state_dict())
    return schedule


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
