"""Let torchrun fork its ranks from the fork server, instead of starting an interpreter for each."""

import functools
import sys
from typing import Any

from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from distlenet.launch.warm_start import ForkServer
from distlenet.utils.errors import warn


class ForkedRankHandler(SubprocessHandler):
    """torchrun's handler of a rank, which is forked if possible."""

    def __init__(self, server: ForkServer, **options: Any) -> None:
        self.server = server
        super().__init__(**options)

    def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:
        cpus, command = split_numactl(args)
        if command[:2] == (sys.executable, "-u"):
            outputs = tuple(file.name if file else None for file in (self._stdout, self._stderr))
            if rank := self.server.fork((command[2:], env, outputs, cpus)):
                return rank
        return super()._popen(args, env)


def split_numactl(words: tuple[str, ...]) -> tuple[set[int], tuple[str, ...]]:
    """Return the CPUs and the command of ``numactl --physcpubind=0-3,8 COMMAND...``; no CPUs for another command.

    On nodes with GPUs, torchrun binds each rank to CPUs near its GPU in this way.
    """
    prefix = "--physcpubind="
    if len(words) < 2 or words[0] != "numactl" or not words[1].startswith(prefix):
        return set(), words
    cpus: set[int] = set()
    for part in words[1].removeprefix(prefix).split(","):
        first, _, last = part.partition("-")
        cpus |= set(range(int(first), int(last or first) + 1))
    return cpus, words[2:]


def use_fork_server(server: ForkServer) -> None:
    """Let torchrun in this process fork its ranks, if this version of torch has the function that is replaced."""
    if not hasattr(api, "get_subprocess_handler"):
        server.stop()
        warn("no warm start: this version of torch starts ranks in another way; they start in new interpreters")
        return
    api.get_subprocess_handler = functools.partial(ForkedRankHandler, server)
