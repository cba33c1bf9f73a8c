"""How ranks meet: in a key-value store, in which each says that it is there, before there is a process group."""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import cast

import torch.distributed as dist
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous as torch_rendezvous

from distlenet.distributed.address import address, first_host, resolve, wait_for_port
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.utils.errors import RankError

GRACE_S = 10.0
"""Seconds beyond twice its timeout that a store may take to open: torch tries twice, and waits in between."""


def open_store(env: DistributedEnvironment, timeout: timedelta) -> Store:
    """Open the job's key-value store: in this process, in torchrun's agent, or in rank 0."""
    if env.init_method is None:  # a group of one: no address, no port, no network
        return cast(Store, HashStore())
    resolve(first_host(env))
    if env.init_method == "env://":
        store, _, _ = next(torch_rendezvous(env.init_method, env.rank, env.world_size, timeout=timeout))
        return cast(Store, store)
    host, port = address(env)
    if env.rank != 0:
        wait_for_port(host, port, time.monotonic() + timeout.total_seconds(), env)
    # Does not wait for the others: ``meet`` does, which can say who is missing.
    return in_time(lambda: TCPStore(host, port, None, env.rank == 0, timeout, wait_for_workers=False), timeout, env)


def in_time(make: Callable[[], Store], timeout: timedelta, env: DistributedEnvironment) -> Store:
    """Make a store. Raises RankError where whoever listens there does not answer, for which torch waits for ever."""
    made: list[Store] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            made.append(make())
        except BaseException as error:  # for the thread that waits
            failures.append(error)

    thread = threading.Thread(target=run, name="store", daemon=True)
    thread.start()
    thread.join(2 * timeout.total_seconds() + GRACE_S)  # sooner, and it could end while the process does, and abort it
    if failures:
        raise failures[0]
    if not made:
        host, port = address(env)
        raise RankError(
            f"rank {env.rank} of {env.world_size}: what listens at {host}:{port} is not rank 0; "
            "set MASTER_PORT to a free port for all ranks"
        )
    return made[0]


def meet(store: Store, env: DistributedEnvironment, timeout: timedelta, setting: str) -> Store:
    """Wait until all ranks are here; return the part of the store that is theirs alone.

    torchrun keeps one store over all restarts of the ranks (seen with torch 2.15), so what it holds may be of ranks
    that are dead: their addresses, too, with which a process group would wait for ever. So rank 0 makes a name for
    this start. Each other rank answers under it, with a word of its own that rank 0 must repeat: a name whose
    repeated word is another's is an old one.
    Raises RankError that names the ranks that are not here after ``timeout``, and the ``setting`` that it comes from.
    """
    deadline, word = time.monotonic() + timeout.total_seconds(), uuid.uuid4().hex
    own = f"{word} {socket.gethostname()}"
    if env.rank == 0:
        here = PrefixStore(f"distlenet/{word}", store)
        here.set(host_key(0), own)
        store.set("distlenet/start", word)
        _wait(here, [host_key(rank) for rank in range(env.world_size)], deadline, env, setting)
        words = {rank: here.get(host_key(rank)).decode().split()[0] for rank in range(env.world_size)}
        here.set("words", json.dumps(words))
        return here
    while True:
        _wait(store, ["distlenet/start"], deadline, env, setting)
        here = PrefixStore(f"distlenet/{store.get('distlenet/start').decode()}", store)
        here.set(host_key(env.rank), own)
        with contextlib.suppress(dist.DistStoreError):  # not yet, or never: then look for a newer name
            here.wait(["words"], timedelta(seconds=1))
            if json.loads(here.get("words")).get(str(env.rank)) == word:
                return here
            time.sleep(0.02)
        if time.monotonic() > deadline:
            _wait(here, [host_key(rank) for rank in range(env.world_size)], deadline, env, setting)
            raise RankError(
                f"rank {env.rank} of {env.world_size} on {socket.gethostname()}: rank 0 did not answer; look "
                "whether its process runs"
            )


def _wait(store: Store, keys: list[str], deadline: float, env: DistributedEnvironment, setting: str) -> None:
    """Wait for ranks' ``keys``; raise RankError that says whose are missing after ``deadline``."""
    try:
        store.wait(keys, timedelta(seconds=max(0.01, deadline - time.monotonic())))
    except dist.DistStoreError as error:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise RankError(
            f"rank {env.rank} of {env.world_size} on {socket.gethostname()}: {format_ranks(missing)} did not "
            f"come in time ({setting}); look whether their nodes run, and reach the node of rank 0"
        ) from error


def host_key(rank: int) -> str:
    """Name the entry that a rank makes when it comes."""
    return f"host/{rank}"


def host_of(store: Store, rank: int) -> str:
    """Return the name of a rank's host, as the rank itself said."""
    return store.get(host_key(rank)).decode().partition(" ")[2]


def format_ranks(ranks: Sequence[int], most: int = 16) -> str:
    """Write ``rank 3`` or ``ranks 3, 5, 6``, and of very many the first."""
    listed = ", ".join(str(rank) for rank in ranks[:most]) + (f" and {len(ranks) - most} more" * (len(ranks) > most))
    return f"rank{'s' * (len(ranks) != 1)} {listed}"


def rendezvous(env: DistributedEnvironment, timeout_s: float, setting: str = "distributed.init_timeout_s") -> Store:
    """Wait until all ranks are here; return the part of their store that is this start's.

    They have ``timeout_s`` seconds, as ``setting`` says. Raises RankError where they do not come together.
    """
    timeout = timedelta(seconds=timeout_s)
    with convert_rendezvous_errors(env):
        return meet(open_store(env, timeout), env, timeout, setting)


@contextmanager
def convert_rendezvous_errors(env: DistributedEnvironment) -> Iterator[None]:
    """Turn what torch raises where ranks do not come together into a RankError."""
    try:
        yield
    except (dist.DistNetworkError, dist.DistStoreError, ValueError, RuntimeError) as error:
        host, port = first_host(env), (env.init_method or "").rpartition(":")[2]
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise RankError(
                f"port {port} on {socket.gethostname()} is in use, by another job or what is left of one; "
                "set MASTER_PORT to a free one for all ranks, or end that process"
            ) from error
        if "find address for" in str(error):  # Gloo
            pinned, has = os.environ.get("GLOO_SOCKET_IFNAME", ""), ", ".join(n for _, n in socket.if_nameindex())
            raise RankError(
                f"GLOO_SOCKET_IFNAME={pinned}: {socket.gethostname()} has no such network interface with an address; "
                f"it has {has}; set one of them, or unset it"
            ) from error
        if isinstance(error, RuntimeError) and not isinstance(error, dist.DistError):
            raise  # no matter of meeting
        where = "torchrun's agent" if env.init_method == "env://" else f"{host}:{port}"
        raise RankError(
            f"rank {env.rank} of {env.world_size} could not join the others at {where}: "
            f"{str(error).splitlines()[0]}; look whether MASTER_ADDR and MASTER_PORT are rank 0's"
        ) from error
