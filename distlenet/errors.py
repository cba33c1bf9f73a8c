"""The exceptions that an entry turns into one line, and the one way to warn."""

import contextlib
import sys


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
    """Print one line to standard error; where nobody hears it (a full disk, a closed terminal), work goes on."""
    with contextlib.suppress(OSError, ValueError):
        print("distlenet:", " ".join(text.split()), file=sys.stderr, flush=True)
