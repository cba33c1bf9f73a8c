"""Tracebacks for a screen, which begin with the user's code: the frames of distlenet do not explain an error in it."""

import sysconfig
import traceback
from pathlib import Path
from types import TracebackType

import torch

import distlenet

PACKAGE = Path(distlenet.__file__).parent
TORCH = Path(torch.__file__).parent
STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
IN_WORKER = "Original Traceback (most recent call last):"  # in the text of an exception of a loader's worker


def format_traceback(error: Exception) -> list[str]:
    """Return the lines of a traceback without the outer frames of distlenet.distributed, which only forward it."""
    inner = error.__traceback__
    while inner and inner.tb_next and _path(inner).parent == Path(__file__).parent:
        inner = inner.tb_next
    return _format(error, inner)


def user_traceback(error: Exception) -> list[str]:
    """Return the lines of a traceback from the user's code on, where distlenet called it last; else all."""
    start, raised_it = _find_user_code(error)
    if not raised_it and IN_WORKER in str(error):
        return _from_user_code(_format(error, None))
    return format_traceback(error) if start is None else _format(error, start)


def is_raised_by_user(error: Exception) -> bool:
    """Return whether the user's code, or what it called, raised an exception."""
    return _find_user_code(error)[1]


def _find_user_code(error: Exception) -> tuple[TracebackType | None, bool]:
    """Return the first frame of the user's code after distlenet called it last, and whether it called nothing back.

    The user's code is everything but distlenet, torch and the standard library.
    """
    start, is_inside, frame = None, False, error.__traceback__
    while frame is not None:
        path = _path(frame)
        if path.is_relative_to(PACKAGE):
            is_inside = False
        elif not _is_library(path):
            start, is_inside = start if is_inside else frame, True
        frame = frame.tb_next
    return start, is_inside


def _from_user_code(lines: list[str]) -> list[str]:
    """Return the lines of an exception of a loader's worker without the frames before the user's code."""
    first = lines.index(IN_WORKER) + 1 if IN_WORKER in lines else 0
    frames = [number for number in range(first, len(lines)) if lines[number].startswith('  File "')]
    for number in frames:
        path = Path(lines[number].split('"')[1])
        if not path.is_relative_to(PACKAGE) and not _is_library(path):
            return lines[:first] + lines[number:]
    return lines


def _is_library(path: Path) -> bool:
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    standard = path.is_relative_to(STANDARD_LIBRARY) and not installed
    return standard or path.is_relative_to(TORCH) or str(path).startswith("<frozen ")


def _path(frame: TracebackType) -> Path:
    return Path(frame.tb_frame.f_code.co_filename)


def _format(error: Exception, start: TracebackType | None) -> list[str]:
    return "".join(traceback.format_exception(type(error), error, start)).rstrip().splitlines()
