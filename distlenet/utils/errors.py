"""The exceptions that an entry point reports in one line, and warnings."""

import contextlib
import logging
import re
import sys
import traceback

from distlenet.utils.startup import PREEMPTED

LOGGER = logging.getLogger("distlenet")
"""Receives every warning. A rank's log adds a handler to it."""
RANK_LOG = "rank"  # the name of that handler
LOGGER.setLevel(logging.INFO)
LOGGER.propagate = False
LOGGER.addHandler(logging.NullHandler())


class UserError(Exception):
    """A mistake in the user's input: a setting, a file, an environment variable.

    Its text is one line that names what was given, what is wrong and how to fix it. The entry points print that line
    once per job, without a traceback, and exit with status 2.
    """


class RankError(UserError):
    """A UserError that may occur on a single node or rank, such as a wrong environment variable."""


class Preempted(Exception):
    """The run has stopped on request. The text contains the last step and whether it is saved."""

    def __init__(self, text: str, status: int = PREEMPTED) -> None:
        super().__init__(text)
        self.status = status  # of the command that ends


def one_line(error: object, limit: int = 300) -> str:
    """Return the text of an error without line breaks, of at most ``limit`` characters; "…" stands for the rest."""
    text = " ".join(str(error).split())
    if len(text) <= limit:
        return text
    return re.sub(r"\s\S{0,40}$", "", text[: limit - 1]) + "…"  # cut at a word, unless that is very long


def describe_error(error: BaseException, limit: int = 300) -> str:
    """Return the type and the text of an error in one line, cut to ``limit`` characters."""
    return one_line(f"{type(error).__name__}: {error}".removesuffix(": "), limit)


def warn(text: str) -> None:
    """Print one line to standard error and log it to ``LOGGER``."""
    line = printable(" ".join(text.split()))
    LOGGER.info(line)
    print_error(f"distlenet: {line}")


def log_traceback(error: Exception) -> str:
    """Log the traceback of an exception that a message describes in one line; return the path of the log, or ""."""
    LOGGER.info("".join(traceback.format_exception(error)).rstrip())
    files = [handler for handler in LOGGER.handlers if isinstance(handler, logging.FileHandler)]
    return next((file.baseFilename for file in files if file.name == RANK_LOG), "")


def printable(text: str) -> str:
    """Escape control characters and what cannot be encoded; names of files and classes may contain both."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def print_error(text: str) -> None:
    """Print to standard error in one write. Ignore a failure, such as a full disk or a closed terminal."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
