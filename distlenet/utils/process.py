"""Settings of processes: when this one exits, how it allocates memory, and which variables a new one gets.

This module imports only the standard library: entry points use it before they import torch, which takes seconds.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Mapping

PR_SET_PDEATHSIG = 1  # prctl(2)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MMAP_THRESHOLD_MAX = 32 * 2**20  # bytes; the largest value of M_MMAP_THRESHOLD on 64-bit machines, mallopt(3)


def exit_with_agent(environ: Mapping[str, str] = os.environ) -> None:
    """Let the kernel kill a rank of torchrun when its parent, the agent, dies. Other ranks may outlive their shell."""
    if "TORCHELASTIC_RUN_ID" in environ:
        exit_with_parent()


def exit_with_parent() -> None:
    """Let the kernel kill this process when its parent dies."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the call
        sys.exit(1)


def environment_outside_job(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment of a new process that is no rank of this job: without the variables of its launcher."""
    return {name: value for name, value in environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC_"))}


def tune_malloc() -> None:
    """Keep freed memory in the process for the next step, if the C library is glibc.

    Each step frees its activations and allocates the same sizes again. By default, glibc returns large blocks to the
    kernel each time, which has to clear and map new pages: up to a third of the step of a small network
    (benchmarks/RESULTS.md). The peak of the process's memory stays the same.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_MAX)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
