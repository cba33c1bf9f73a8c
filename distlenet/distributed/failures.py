"""Which rank failed first, and why: one block for the whole job, whichever ranks fail after it."""

import re
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from distlenet.distributed.environment import DistributedEnvironment
from distlenet.distributed.rank_log import RankLog
from distlenet.utils.errors import Preempted, UserError, print_error

ASK_S = 2.0
"""Seconds that the store has to say who failed before."""

MOST = 8
"""How many ranks tell that they failed, too; in a large job, all do."""

MOST_CHARACTERS = 140
"""How much of its message each of those prints."""

PASSING = ("failures.py", "context.py", "entry_point.py")
"""The files of this package through which every exception comes."""

LOST = re.compile(r"closed by peer|reset by peer|broken pipe|remote process exited|connection refused", re.IGNORECASE)


@contextmanager
def report_failures(store: Store, env: DistributedEnvironment, log: RankLog) -> Iterator[None]:
    """Tell of an exception that ends this rank: the first in the job with its traceback, the next in a line.

    Each writes its traceback to its log. ``store`` is that of this start of the ranks alone.
    """
    try:
        yield
    except (UserError, Preempted):
        raise
    except Exception as error:
        log.write("\n".join(_traceback(error)))
        where = f"\ndistlenet: its log is {log.handler.baseFilename}" if log.handler else ""
        place = _place(store)
        if place == 1:
            print_error(format_failure(error, env) + where)
        elif place <= MOST:
            text = " ".join(str(error).split())[:MOST_CHARACTERS]
            who = f"rank {env.rank} of {env.world_size} on {socket.gethostname()}"
            print_error(f"distlenet: {who} failed after it: {type(error).__name__}: {text}")
        error.reported = True  # type: ignore[attr-defined]
        raise


def _place(store: Store) -> int:
    """Return how many ranks have failed, this one among them; 1 where nobody is there to ask."""
    try:
        store.set_timeout(timedelta(seconds=ASK_S))
        return store.add("failures", 1)
    except (dist.DistError, RuntimeError):
        return 1


def format_failure(error: Exception, env: DistributedEnvironment) -> str:
    """Write what ended a rank."""
    who = f"rank {env.rank} of {env.world_size} on {socket.gethostname()} " if env.world_size > 1 else ""
    text = f"distlenet: {who}failed:\n" + "\n".join(f"  {line}" for line in _traceback(error))
    if LOST.search(str(error)):
        text += "\ndistlenet: another rank has gone without a word: killed, out of memory, or its node is down"
    return text


def _traceback(error: Exception) -> list[str]:
    """Write a traceback, without the places that only pass an exception on."""
    inner = error.__traceback__
    while inner is not None and inner.tb_next is not None and Path(inner.tb_frame.f_code.co_filename).name in PASSING:
        inner = inner.tb_next
    lines = traceback.format_exception(type(error), error, inner)
    return "".join(lines).rstrip().splitlines()
