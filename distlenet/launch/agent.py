"""torchrun's agent, whose report of a failure is one line: the ranks have printed the reason before."""

import logging
import signal
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from distlenet.utils.errors import warn


def run_agent(words: Sequence[str] | None = None) -> int:
    """Run torchrun with its arguments (those of the command line), and return the exit status.

    It is that of the rank that failed first, 1 if a signal ended this rank, or 128 and the number of the signal that
    ended the agent.
    """
    # The loggers repeat what the line contains.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    agent = logging.getLogger("torch.distributed.elastic.agent.server.api")
    agent.addFilter(lambda record: "death signal" not in str(record.msg))
    try:
        run.run(run.parse_args(words))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        warn(f"rank {rank} {_end_of(failure)}; all ranks of this node have ended")
        return max(failure.exitcode, 1)
    except SignalException as error:
        warn(f"all ranks of this node have ended after {signal.Signals(error.sigval).name}")
        return 128 + error.sigval
    return 0


def _end_of(failure: ProcessFailure) -> str:
    """Return how a rank ended."""
    if failure.exitcode < 0:
        return f"was killed by {failure.signal_name()}"
    return f"exited with status {failure.exitcode}"
