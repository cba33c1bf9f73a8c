"""The exceptions that an entry turns into one line, and the one way to warn."""

import contextlib
import logging
import sys

LOGGER = logging.getLogger("distlenet")
"""Hears every warning: a rank's log listens."""
LOGGER.setLevel(logging.INFO)
LOGGER.propagate = False
LOGGER.addHandler(logging.NullHandler())


class UserError(Exception):
    """A mistake in what the user gave: a config key, a file, an environment variable.

    Its text is one line that names what was given, the rule it breaks and the mend. The entries
    print that line once for the whole job, without a traceback, and exit with status 2.
    """


class RankError(UserError):
    """A mistake that one node or rank alone may see, such as in its environment."""


class Preempted(Exception):
    """The run was asked to stop, and has. Its text says after which step, and what is saved."""


def warn(text: str) -> None:
    """Print one line to standard error, and tell ``LOGGER``."""
    line = printable(" ".join(text.split()))
    LOGGER.info(line)
    print_error(f"distlenet: {line}")


def printable(text: str) -> str:
    """Write what a terminal would obey, or no file can hold, as an escape: names of files and classes may have any."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def print_error(text: str) -> None:
    """Print to standard error, as a whole; where nobody hears it (a full disk, a closed terminal), work goes on."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
