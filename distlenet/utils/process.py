"""No rank outlives the agent that started it, and no loader's worker its rank.

Imports nothing heavy: an entry calls it before importing torch, which takes seconds in which an agent may die.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Mapping

PR_SET_PDEATHSIG = 1


def exit_with_agent(environ: Mapping[str, str] = os.environ) -> None:
    """Have the kernel kill this process when torchrun's agent, its parent, dies: it would train on, unseen.

    Does nothing outside torchrun: a rank that a shell started may outlive it.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        exit_with_parent()


def exit_with_parent() -> None:
    """Have the kernel kill this process when its parent dies. Source: prctl(2), PR_SET_PDEATHSIG."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died in between
        sys.exit(1)
