"""What all commands share: one grammar of arguments, and one way to end."""

import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from distlenet.distributed.environment import DistributedEnvironment, read_environment
from distlenet.distributed.failures import format_failure
from distlenet.distributed.rank_log import dump_stacks_on_signal
from distlenet.utils.errors import Preempted, RankError, UserError, print_error, warn


def should_report(why: Exception | None = None) -> bool:
    """Say whether this is the first rank: of its node, for what a node may see alone (RankError), else of the job."""
    names = ("LOCAL_RANK", "SLURM_LOCALID") if isinstance(why, RankError) else ("RANK", "SLURM_PROCID")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


PREEMPTED = 75
"""Exit status of a run that stopped as asked and is to be run again: EX_TEMPFAIL of BSD's sysexits.h."""

LINGER_S = 10.0  # seconds that rank 0 has to print what all ranks know


def _tell_agent_to_stop() -> None:
    """End torchrun's agent, this process's parent, where it would start again what no restart mends."""
    most, count = (os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("MAX_RESTARTS", "RESTART_COUNT"))
    restarts_left = most.isdecimal() and count.isdecimal() and int(most) > int(count)
    if "TORCHELASTIC_RUN_ID" in os.environ and restarts_left:
        os.kill(os.getppid(), signal.SIGTERM)


def run_entry(main: Callable[[], None]) -> NoReturn:
    """Run a command and exit: 0 done, 2 the user can mend it, 75 stopped as asked, 130 interrupted, 1 anything else.

    What the user can mend is one line on standard error, once for the whole job: rank 0 speaks at once, since
    a mistake in settings is the same on every rank, and ``raise_on_all_ranks`` makes the others so; for what a node may
    see alone (``RankError``), its first rank does. The other ranks linger, because torchrun ends all when it sees
    one gone, and rank 0 may still be importing; a rank that nobody has ended by then speaks for itself.
    """

    def guarded() -> int:
        try:
            main()
        except UserError as error:
            if not should_report(error):
                time.sleep(LINGER_S)
                if "RANK" not in os.environ:  # srun ends nobody early: rank 0 has spoken
                    return 2
            warn(str(error))
            _tell_agent_to_stop()
            return 2
        except Preempted as stopped:
            if should_report():
                warn(str(stopped))
            return PREEMPTED
        except BrokenPipeError:  # nobody reads on (``| head``)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except KeyboardInterrupt:
            if should_report():
                warn(
                    "interrupted, and nothing saved now: the same command goes on from the run's newest checkpoint, if "
                    "it has one; kill -TERM saves before it ends"
                )
            return 130
        return 0

    for name in ("stdout", "stderr"):  # closed by who started this: nobody hears it
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an odd locale costs a character, not the run
    if sys.__stderr__ is not None:
        dump_stacks_on_signal(sys.__stderr__)
    try:
        sys.exit(guarded())
    except Exception as error:  # what the user cannot mend
        if not hasattr(error, "reported"):
            env = DistributedEnvironment()
            with contextlib.suppress(UserError):
                env = read_environment(os.environ)
            print_error(format_failure(error, env))
        sys.exit(1)
