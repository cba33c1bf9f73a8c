"""Where rank 0 is found: its host's name and its port."""

import itertools
import os
import socket
import time

from distlenet.distributed.environment import DistributedEnvironment
from distlenet.utils.errors import RankError

RESOLVE_S = 10.0
"""Seconds in which a host's name must become known; it is asked for twice at least."""


def first_host(env: DistributedEnvironment) -> str:
    """Return the name of the host where all meet; empty for a process alone."""
    if env.init_method == "env://":
        return os.environ["MASTER_ADDR"]
    return (env.init_method or "").removeprefix("tcp://").rpartition(":")[0]


def resolve(host: str) -> None:
    """Raise RankError where a host's name stays unknown here: torch would try for as long as ranks may take to start.

    Not at once: one name server's bad second must not end a job of many nodes.
    """
    deadline = time.monotonic() + RESOLVE_S
    for tries in itertools.count(1):
        try:
            socket.getaddrinfo(host, None)
            return
        except (OSError, UnicodeError) as error:
            if (tries > 1 and time.monotonic() > deadline) or isinstance(error, UnicodeError):
                raise RankError(
                    f"the name {host}, where the ranks meet, cannot be resolved on {socket.gethostname()} "
                    f"({getattr(error, 'strerror', None) or error}); give a name that all nodes know, or its address, "
                    "as MASTER_ADDR, or on that node as torchrun's --local-addr"
                ) from error
            time.sleep(0.5)


def address(env: DistributedEnvironment) -> tuple[str, int]:
    """Return host and port of rank 0's store, for ranks that no torchrun has started."""
    return first_host(env), int(str(env.init_method).rpartition(":")[2])


def wait_for_port(host: str, port: int, deadline: float, env: DistributedEnvironment) -> None:
    """Wait until somebody listens; torch would wait, too, but print stacks and say less. Raises RankError."""
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(0.1, min(5.0, deadline - time.monotonic()))):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RankError(
                    f"rank {env.rank} of {env.world_size} on {socket.gethostname()} cannot reach rank 0 at "
                    f"{host}:{port}: {error.strerror or error}; look whether {host} is rank 0's host (MASTER_ADDR), "
                    "whether that rank has started, and whether the port is open"
                ) from error
            time.sleep(0.1)
