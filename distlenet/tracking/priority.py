"""Give the ranks priority over the sidecar and W&B's own process, which run next to them."""

import os
import time
from contextlib import suppress
from pathlib import Path

import psutil


def lower_priority() -> None:
    """Run the calling thread only when a CPU is idle. Threads and processes that it starts later inherit this."""
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def set_session_share(nice: int) -> None:
    """Give the sessions of this process's children the CPU share of ``nice``: 19 is the least, 0 the default.

    Linux divides the CPU time among sessions first, and W&B's process starts its own session, in which its low
    priority has no effect on the ranks. Source: https://man7.org/linux/man-pages/man7/sched.7.html, autogroup
    """
    for child in process_tree(os.getpid())[1:]:
        for _ in range(3):
            try:
                Path(f"/proc/{child.pid}/autogroup").write_text(str(nice), encoding="ascii")
                break
            except BlockingIOError:  # Linux allows one change in 0.1 s, of all users
                time.sleep(0.15)
            except OSError:  # Linux does not group by session, or the process has ended
                break


def process_tree(pid: int) -> list[psutil.Process]:
    """Return a process and all its descendants, as far as they are visible; none if it has ended."""
    tree: list[psutil.Process] = []
    with suppress(OSError, psutil.Error):
        tree.append(psutil.Process(pid))
        tree += tree[0].children(recursive=True)
    return tree
