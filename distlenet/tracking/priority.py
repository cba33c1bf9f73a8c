"""How a process beside a training leaves the processors to the ranks."""

import os
import time
from contextlib import suppress
from pathlib import Path

import psutil


def lower_priority() -> None:
    """Leave the processors to the ranks: have all threads here, and in W&B's processes, run where those are idle."""
    for process in process_tree():
        with suppress(OSError, psutil.Error):
            for thread in process.threads():
                with suppress(OSError):  # it has just ended
                    os.setpriority(os.PRIO_PROCESS, thread.id, 19)
                    os.sched_setscheduler(thread.id, os.SCHED_IDLE, os.sched_param(0))
    set_session_share(19)


def set_session_share(nice: int) -> None:
    """Have the sessions of this process and of W&B's take the share of the processors that ``nice`` (0 to 19) gives.

    Where Linux groups by sessions (sched_autogroup_enabled), all have the same share, whatever the priorities within.
    Source: https://man7.org/linux/man-pages/man7/sched.7.html
    """
    for process in process_tree():
        for _ in range(3):
            try:
                Path(f"/proc/{process.pid}/autogroup").write_text(str(nice), encoding="ascii")
            except BlockingIOError:  # 0.1 s must lie between two such changes, whoever makes them
                time.sleep(0.15)
            except OSError:  # Linux does not group by sessions
                break
            else:
                break


def process_tree() -> list[psutil.Process]:
    """Return this process, and those below it as far as they can be seen."""
    me = psutil.Process()
    with suppress(OSError, psutil.Error):
        return [me, *me.children(recursive=True)]
    return [me]
