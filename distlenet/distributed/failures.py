"""Failure reports: the first rank that fails prints the traceback of the user's code, the others at most a line."""

import contextlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed.distributed_c10d import Store

from distlenet.distributed.environment import DistributedEnvironment
from distlenet.distributed.rank_log import RankLog
from distlenet.distributed.tracebacks import format_traceback, is_raised_by_user, user_traceback
from distlenet.utils.agent_report import record_failure
from distlenet.utils.errors import Preempted, RankError, UserError, one_line, print_error, printable, warn

STORE_TIMEOUT_S = 2.0
USER_ERROR = "user_error"  # the store's key of its text
MAX_REPORTS = 8  # in a large job all ranks fail after the first
MAX_CHARACTERS = 140  # of the message in a report of one line
PEER_LOST = re.compile("(?i)closed by peer|reset by peer|broken pipe|remote process exited|connection refused")
SOURCE_LINE = re.compile(r"^\[\S+:\d+\] ")  # at the start of Gloo's messages


@contextmanager
def report_failures(store: Store, env: DistributedEnvironment, log: RankLog) -> Iterator[None]:
    """Report an exception of this rank, log its traceback, and raise it again; ``store`` counts the failures.

    A rank that loses its connection to one that raised a UserError raises it, too; see ``_report_user_error``. A
    RankError is passed on: it may differ between nodes.
    """
    try:
        yield
    except (Preempted, RankError):
        raise
    except UserError as error:
        if env.world_size > 1:
            _report_user_error(store, error)
        raise
    except Exception as error:
        if _is_lost_connection(error) and (text := _user_error_of_another_rank(store)):
            user_error = UserError(text)
            user_error.reported = False  # type: ignore[attr-defined]
            raise user_error from error
        log.write("\n".join(format_traceback(error)))
        failures = 1
        with contextlib.suppress(RuntimeError):  # the store may not respond
            store.set_timeout(timedelta(seconds=STORE_TIMEOUT_S))
            failures = store.add("failures", 1)
        if failures == 1:
            print_error(format_failure(error, env, log.handler.baseFilename if log.handler else None))
            if not _is_lost_connection(error):
                record_failure(f"distlenet: {env} failed: {describe_failure(error)}")
        elif failures <= MAX_REPORTS and not _is_lost_connection(error):
            print_error(f"distlenet: {env} failed after it: {describe_failure(error)}")
        error.reported = True  # type: ignore[attr-defined]
        raise


def _report_user_error(store: Store, error: UserError) -> None:
    """Print the line if no rank has printed one, before this rank ends: torchrun ends all ranks when one exits.

    ``error.reported`` is then whether this rank has printed it.
    """
    with contextlib.suppress(RuntimeError):  # the store may not respond: then the entry point prints
        store.set_timeout(timedelta(seconds=STORE_TIMEOUT_S))
        store.set(USER_ERROR, printable(str(error)))  # a store takes UTF-8 only; names of files may be none
        error.reported = store.add("user_errors", 1) == 1  # type: ignore[attr-defined]
        if error.reported:  # type: ignore[attr-defined]
            warn(str(error))
            record_failure(f"distlenet: {error}")


def _user_error_of_another_rank(store: Store) -> str:
    """Return the text of a UserError that a rank has raised; an empty string if there is none."""
    with contextlib.suppress(RuntimeError):  # the store may not respond
        store.set_timeout(timedelta(seconds=STORE_TIMEOUT_S))
        if store.check([USER_ERROR]):
            return store.get(USER_ERROR).decode()
    return ""


def format_failure(error: Exception, env: DistributedEnvironment, log_file: str | None = None) -> str:
    """Return the message that reports an exception: one line for a lost connection, else with its traceback.

    If ``log_file`` contains the whole traceback, the message begins with the user's code.
    """
    rank = f"{env} " if env.world_size > 1 else ""
    log_hint = f"; the log is {log_file}" if log_file else ""
    if _is_lost_connection(error):
        return (
            f"distlenet: {rank}lost a connection: {describe_failure(error)}; another rank has exited without a report: "
            f"killed, out of memory, or its node is down{log_hint}"
        )
    lines = user_traceback(error) if log_file else format_traceback(error)
    return f"distlenet: {rank}failed{log_hint}:\n" + "\n".join(f"  {line}" for line in lines)


def _is_lost_connection(error: Exception) -> bool:
    """Return whether another rank has ended. The user's code may lose connections to other servers."""
    return PEER_LOST.search(str(error)) is not None and not is_raised_by_user(error)


def describe_failure(error: Exception) -> str:
    """Return the type and the text of an exception in one short line, without Gloo's source line."""
    return f"{type(error).__name__}: {one_line(SOURCE_LINE.sub('', one_line(error)), MAX_CHARACTERS)}"
