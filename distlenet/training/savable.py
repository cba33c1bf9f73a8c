"""Checks of an optimizer or a schedule that is not built in, before the first step."""

import inspect
from collections.abc import Callable
from typing import Any

from distlenet.checkpoint.archive import from_bytes, to_bytes
from distlenet.utils.errors import UserError, one_line


def required_arguments(function: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments without which ``function`` cannot be called."""
    parameters = inspect.signature(function).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


def check_savable(given: str, state: dict[str, Any]) -> None:
    """Raise UserError if a checkpoint that holds ``state``, that of ``given``, could not be loaded again."""
    try:
        from_bytes(to_bytes({"state": state}))
    except Exception as error:  # pickle raises many types
        reason = one_line(error.__cause__ or error, 200)
        raise UserError(
            f"{given}: a checkpoint cannot hold its state ({reason}); its state_dict may contain tensors, numbers, "
            "strings, lists and dicts"
        ) from error
