"""What all commands share: one grammar of arguments, and one way to end."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.errors import record

from distlenet.config import FIELDS, describe
from distlenet.errors import RankError, UserError

LINGER_S = 10.0  # seconds that rank 0 has to print what all ranks know


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}")


def parse_arguments(prog: str, description: str, argv: Sequence[str] | None = None) -> tuple[list[str], list[str]]:
    """Read ``[--config FILE]... [key=value]...`` into the files and the overrides, each in order.

    Raises UserError for anything else; ``--help`` prints all settings and exits.
    """
    parser = _Parser(
        f"python -m {prog}",
        description=description,
        epilog="settings:\n"
        + "\n".join(f"  {key:30}{describe(key)}. {f.metadata['help']}" for key, f in FIELDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", metavar="FILE", action="append", default=[], help="settings as YAML; later files win"
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="a setting, over all files")
    arguments = parser.parse_intermixed_args(argv)
    return arguments.config, arguments.overrides


def run_entry(main: Callable[[], None]) -> NoReturn:
    """Run a command and exit: 0 done, 2 the user can mend it, 130 interrupted, 1 anything else.

    What the user can mend is one line on standard error, once for the whole job: rank 0 speaks, since a
    mistake in settings is the same on every rank, and ``all_or_none`` makes the others so. The other ranks
    linger, because torchrun ends all when it sees one gone, and rank 0 may still be importing.
    A mistake that one process alone can see (``RankError``) is printed by that process, at once.
    """

    @record  # under torchrun, leaves the traceback where the agent's report of failures finds it
    def guarded() -> int:
        try:
            main()
        except UserError as error:
            rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
            if rank != "0" and not isinstance(error, RankError):
                time.sleep(LINGER_S)
            else:
                print(f"distlenet: {error}", file=sys.stderr, flush=True)
            return 2
        except KeyboardInterrupt:
            return 130
        return 0

    sys.exit(guarded())
