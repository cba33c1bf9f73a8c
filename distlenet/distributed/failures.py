"""Failure reports: the first rank that fails prints its traceback, the ranks that fail after it one line each."""

import contextlib
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from torch.distributed.distributed_c10d import Store

from distlenet.distributed.environment import DistributedEnvironment
from distlenet.distributed.rank_log import RankLog
from distlenet.utils.errors import Preempted, UserError, print_error

STORE_TIMEOUT_S = 2.0
MAX_REPORTS = 8  # in a large job all ranks fail after the first
MAX_CHARACTERS = 140  # of the message in a report of one line
PEER_LOST = re.compile("(?i)closed by peer|reset by peer|broken pipe|remote process exited|connection refused")


@contextmanager
def report_failures(store: Store, env: DistributedEnvironment, log: RankLog) -> Iterator[None]:
    """Report an exception of this rank, log its traceback, and raise it again; ``store`` counts the failures."""
    try:
        yield
    except (UserError, Preempted):
        raise
    except Exception as error:
        log.write("\n".join(_traceback(error)))
        failures = 1
        with contextlib.suppress(RuntimeError):  # the store may not respond
            store.set_timeout(timedelta(seconds=STORE_TIMEOUT_S))
            failures = store.add("failures", 1)
        if failures == 1:
            path = f"\ndistlenet: the log is {log.handler.baseFilename}" if log.handler else ""
            print_error(format_failure(error, env) + path)
        elif failures <= MAX_REPORTS:
            text = " ".join(str(error).split())[:MAX_CHARACTERS]
            print_error(f"distlenet: {env} failed after it: {type(error).__name__}: {text}")
        error.reported = True  # type: ignore[attr-defined]
        raise


def format_failure(error: Exception, env: DistributedEnvironment) -> str:
    """Return the message that reports an exception with its traceback."""
    rank = f"{env} " if env.world_size > 1 else ""
    text = f"distlenet: {rank}failed:\n" + "\n".join(f"  {line}" for line in _traceback(error))
    if PEER_LOST.search(str(error)):
        text += "\ndistlenet: another rank has exited without a report: killed, out of memory, or its node is down"
    return text


def _traceback(error: Exception) -> list[str]:
    """Return the lines of a traceback without the outer frames of distlenet.distributed, which only forward it."""
    inner = error.__traceback__
    while inner and inner.tb_next and Path(inner.tb_frame.f_code.co_filename).parent == Path(__file__).parent:
        inner = inner.tb_next
    return "".join(traceback.format_exception(type(error), error, inner)).rstrip().splitlines()
