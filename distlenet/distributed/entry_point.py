"""Run a command: exit status, error messages, and which rank prints them."""

import contextlib
import io
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from distlenet.distributed.environment import DistributedEnvironment, read_environment
from distlenet.distributed.failures import describe_failure, format_failure
from distlenet.distributed.rank_log import dump_stacks_on_signal
from distlenet.utils.agent_report import forbid_restarts, rank_has_failed, record_failure
from distlenet.utils.errors import Preempted, RankError, UserError, print_error, warn
from distlenet.utils.startup import INTERRUPTED, interrupt, is_first_rank, signal_name

LINGER_S = 10.0  # how long the other ranks wait for rank 0 to print an error
ENDS_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID")  # torchrun and mpirun, which end all when one exits


def run_entry(main: Callable[[], None]) -> NoReturn:
    """Run a command and exit: 0 done, 2 user error, 75 stopped on request, 130 by Ctrl-C, 1 any other failure."""
    if signal.getsignal(signal.SIGINT) is interrupt:  # the imports are done: exceptions may clean up
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character outside the locale's encoding must not end the run
    dump_stacks_on_signal(sys.stderr)
    try:
        sys.exit(_run(main))
    except Exception as error:
        if not hasattr(error, "reported"):
            env = DistributedEnvironment()
            with contextlib.suppress(UserError):
                env = read_environment(os.environ)
            print_error(format_failure(error, env))
            record_failure(describe_failure(error))
        sys.exit(1)


def _run(main: Callable[[], None]) -> int:
    """Return the exit status of ``main``.

    Rank 0 prints a user error that no rank has printed; the first rank of each node prints a RankError. The other ranks
    linger: torchrun and mpirun end all ranks when one exits, and rank 0 may still be importing. A rank still running
    after that prints it.
    """
    try:
        main()
    except UserError as error:
        if not hasattr(error, "reported"):
            if not should_report(error):
                time.sleep(LINGER_S)
                if not any(name in os.environ for name in ENDS_RANKS):  # srun ends no rank early: rank 0 has printed it
                    return 2
            warn(str(error))
            record_failure(f"distlenet: {error}")
        elif not error.reported and rank_has_failed():
            return 2  # that rank stops the agent
        _stop_agent()
        return 2
    except Preempted as stopped:
        if should_report():
            warn(str(stopped))
        return stopped.status
    except BrokenPipeError:
        if not _is_reader_gone():  # of another pipe or socket
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        if should_report():
            warn(f"stopped by {signal_name(signal.SIGINT)}")
        return INTERRUPTED
    return 0


def _is_reader_gone() -> bool:
    """Return whether the reader of standard output has exited, as with ``| head``."""
    poll = select.poll()
    with contextlib.suppress(OSError, ValueError):  # standard output is closed, or not a file
        poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def should_report(error: Exception | None = None) -> bool:
    """Return whether this rank prints: the first of its node for a RankError, else the first of the job."""
    if not isinstance(error, RankError):
        return is_first_rank()
    names = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def _stop_agent() -> None:
    """End torchrun's agent, the parent process, if it would restart ranks that must fail again."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        count, limit = (int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
        if count < limit and forbid_restarts():
            os.kill(os.getppid(), signal.SIGTERM)
