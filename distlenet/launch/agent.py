"""torchrun's agent, whose report of a failure is one line: the ranks have printed the reason before."""

import functools
import logging
import os
import signal
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.distributed import run
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from distlenet.utils.agent_report import NO_RESTARTS_FILE, restarts_are_forbidden
from distlenet.utils.errors import warn
from distlenet.utils.startup import exit_on_signals

USER_ERROR = 2  # exit status of a rank


def run_agent(words: Sequence[str] | None = None) -> int:
    """Run torchrun with its arguments (those of the command line), and return the exit status.

    It is that of the rank that failed first, 1 if a signal ended this rank, or 128 and the number of the signal that
    ended the agent.
    """
    # The loggers repeat what the line contains.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    agent = logging.getLogger("torch.distributed.elastic.agent.server.api")
    agent.addFilter(lambda record: "death signal" not in str(record.msg))
    report_restarts()
    arguments = run.parse_args(words)
    temporary = TemporaryDirectory(prefix="distlenet-agent-", ignore_cleanup_errors=True)
    with temporary as directory:
        exit_on_signals(temporary.cleanup)  # until torchrun starts ranks: before, it waits for other nodes
        if not writes_logs(arguments):
            arguments.log_dir = directory  # else torchrun makes a directory that it does not remove
        os.environ[NO_RESTARTS_FILE] = str(Path(directory) / "no-restarts")
        return _run(arguments)


def report_restarts() -> None:
    """Let torchrun's agents print which rank failed before they restart: torchrun's own lines do not report it."""
    monitor = LocalElasticAgent._monitor_workers

    @functools.wraps(monitor)
    def monitor_and_report(agent: LocalElasticAgent, group: Any) -> Any:
        result = monitor(agent, group)
        if result.is_failed() and agent._remaining_restarts > 0 and not restarts_are_forbidden():
            rank, failure = min(result.failures.items(), key=lambda item: item[1].timestamp)
            warn(f"rank {rank} {_describe_exit(failure)}; restarting the ranks of this node")
        return result

    LocalElasticAgent._monitor_workers = monitor_and_report  # type: ignore[method-assign]


def writes_logs(arguments: Namespace) -> bool:
    """Return whether the user requested logs from torchrun."""
    return arguments.log_dir is not None or arguments.redirects != "0" or arguments.tee != "0"


def _run(arguments: Namespace) -> int:
    try:
        run.run(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        count = arguments.max_restarts
        restarts = f" after {count} restart{'s' * (count > 1)}" if count else ""
        warn(f"rank {rank} {_describe_exit(failure)}{restarts}; all ranks of this node have ended")
        return max(failure.exitcode, 1)
    except SignalException as error:
        if error.sigval == signal.SIGTERM and restarts_are_forbidden():
            warn(f"a rank exited with status {USER_ERROR}, so it is not restarted; all ranks of this node have ended")
            return USER_ERROR
        warn(f"all ranks of this node have ended after {signal.Signals(error.sigval).name}")
        return 128 + error.sigval
    return 0


def _describe_exit(failure: ProcessFailure) -> str:
    """Return how a rank ended."""
    if failure.exitcode < 0:
        return f"was killed by {failure.signal_name()}"
    return f"exited with status {failure.exitcode}"
