"""Names in settings: of built-in parts, or ``module:attribute`` of the user's code."""

import difflib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, TypeVar

from distlenet.utils.errors import UserError, describe_error

T = TypeVar("T")

IMPORT_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_import_name(name: str) -> bool:
    """Return whether ``name`` is ``module:attribute`` rather than the name of a built-in part."""
    return ":" in name


def short_name(name: str) -> str:
    """Return a name without its module: ``Spam`` for ``my_package.tasks:Spam``."""
    return name.rpartition(":")[2].rpartition(".")[2]


def resolve(key: str, name: str, builtin: Mapping[str, Any]) -> Any:
    """Return the callable that the setting ``key`` names; import its module if it is not built in.

    ``load_config`` returns names of the user's code only if the command line or a ``--config`` file contains them. The
    current directory is importable, as with ``python -m``. Raise UserError if the name cannot be imported.
    """
    if not is_import_name(name):
        return builtin[name]
    module_name, _, attribute = name.partition(":")
    value: Any = _import(module_name, f"{key}={name}")
    for part in attribute.split("."):
        if not hasattr(value, part):
            content = getattr(value, "__dict__", {})
            names = [name for name in dir(value) if not isinstance(content.get(name), ModuleType)]
            close = difflib.get_close_matches(part, names, n=1)
            own = [name for name, each in content.items() if getattr(each, "__module__", "") == module_name]
            hint = f"; did you mean {close[0]}?" if close else f"; it defines {', '.join(own)[:300]}" if own else ""
            raise UserError(f"{key}={name}: {module_name} has no attribute {attribute}{hint}")
        value = getattr(value, part)
    if not callable(value):
        raise UserError(f"{key}={name}: is a {type(value).__name__}; expected a class or a function")
    return value


def check_module(key: str, name: str) -> None:
    """Raise UserError if the top-level package of a name of the user's code does not exist. Import nothing."""
    top = name.partition(":")[0].partition(".")[0]
    _import_from_current_directory()
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        raise _no_module(top, f"{key}={name}")


def _import_from_current_directory() -> None:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())


def _no_module(name: str, given: str) -> UserError:
    return UserError(
        f"{given}: there is no module {name}; start in the directory that contains it, or add its directory to "
        "PYTHONPATH"
    )


def _import(name: str, given: str) -> ModuleType:
    _import_from_current_directory()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise _no_module(error.name, given) from error
        raise _import_failure(error, name, given) from error
    except (Exception, SystemExit) as error:  # a script that is not guarded by __name__ may call sys.exit
        raise _import_failure(error, name, given) from error


def _import_failure(error: BaseException, name: str, given: str) -> UserError:
    return UserError(f"{given}: importing {name} failed: {_reason(error)}; fix it")


def check_arguments(key: str, function: Callable[..., Any], args: Mapping[str, Any], positional: int = 0) -> None:
    """Raise UserError if ``function`` does not accept the arguments of the setting ``key``, such as ``model.args``.

    It is called with ``positional`` other arguments before them.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some functions that are written in C, nothing is known
        return
    try:
        signature.bind(*[None] * positional, **args)
    except TypeError as error:
        keywords = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        allowed = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in keywords[positional:]]
        name = getattr(function, "__qualname__", str(function))
        accepted = f"accepts {', '.join(allowed)[:600]}" if allowed else "accepts none"
        raise UserError(f"{key}: {name}: {error}; it {accepted}") from error


def accepts_positional(function: Callable[..., Any]) -> bool:
    """Return whether ``function`` accepts a positional argument, as far as it is known."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # as above
        return True
    return any(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)


def create(kind: type[T], given: str, function: Callable[..., Any], value: Any, key: str, args: Mapping[str, Any]) -> T:
    """Return ``function(value, **args)``, an object of torch's class ``kind``.

    Raise UserError if it does not accept the arguments, which are those of the setting ``key``, or returns something
    else. ``given`` is the setting that names it.
    """
    check_arguments(key, function, args, positional=1)
    try:
        created = function(value, **args)
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:
        raise UserError(f"{given}: {type(error).__name__}: {error}; change {key}") from error
    if not isinstance(created, kind):
        raise UserError(f"{given}: returned a {type(created).__name__}; expected an {kind.__name__} of torch")
    return created


def call(key: str, function: Callable[..., Any], args: Mapping[str, Any], *positional: Any) -> Any:
    """Return ``function(*positional, **args)``; ``key`` is the setting of ``args``, such as ``model.args``.

    Raise UserError if the function does not accept the arguments, or raises a TypeError or ValueError because of them.
    """
    check_arguments(key, function, args, len(positional))
    try:
        return function(*positional, **args)
    except (TypeError, ValueError) as error:
        if not args:  # an error in the function itself
            raise
        given = ", ".join(f"{name}={value!r}" for name, value in args.items())[:300]
        name = getattr(function, "__qualname__", str(function))
        raise UserError(f"{key}: {name}({given}) failed: {_reason(error)}; change the arguments") from error


def _reason(error: BaseException) -> str:
    """Return the type, the text and the place of an error, in one line."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if len(frames) > 1 else ""
    return describe_error(error) + place
