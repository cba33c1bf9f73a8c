"""Rendezvous: before the process group exists, all ranks register in a key-value store."""

import contextlib
import itertools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

import torch.distributed as dist
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from distlenet.distributed.environment import DistributedEnvironment
from distlenet.utils.errors import RankError

T = TypeVar("T")
RESOLVE_TIMEOUT_S = 10.0
CONNECT_MARGIN_S = 10.0  # opening a store takes up to twice its timeout: torch connects twice, with a pause


def rendezvous(env: DistributedEnvironment, timeout_s: float, setting: str = "distributed.init_timeout_s") -> Store:
    """Wait until all ranks have registered; return a store that only this start of the job uses.

    Raise RankError if a rank does not register within ``timeout_s`` seconds, the value of ``setting``.
    """
    with convert_rendezvous_errors(env):
        return register(open_store(env, timeout_s), env, timeout_s, setting)


def open_store(env: DistributedEnvironment, timeout_s: float) -> Store:
    """Open the job's store: in this process, in torchrun's agent, or in rank 0. Raise RankError if that fails."""
    if not env.master_addr:
        return cast(Store, HashStore())
    is_server, timeout = env.rank == 0 and not env.agent_store, timedelta(seconds=timeout_s)
    wait_for_server(env, is_server, timeout_s)
    try:  # without wait_for_workers: ``register`` waits, and names the missing ranks
        return call_with_timeout(
            lambda: TCPStore(env.master_addr, env.master_port, None, is_server, timeout, wait_for_workers=False),
            2 * timeout_s + CONNECT_MARGIN_S,  # TCPStore itself waits forever if the server does not respond
        )
    except TimeoutError as error:
        raise RankError(
            f"{env}: the process that listens on {env.master_addr}:{env.master_port} is not rank 0; set MASTER_PORT "
            "to a free port for all ranks"
        ) from error


def wait_for_server(env: DistributedEnvironment, is_server: bool, timeout_s: float) -> None:
    """Wait until the host name of the store resolves and, unless this rank is the server, its port is open.

    Raise RankError if not. torch would retry a wrong name until its timeout, and print C++ stacks for a closed port.
    """
    host, port, started = env.master_addr, env.master_port, time.monotonic()
    is_pod = "JOB_COMPLETION_INDEX" in os.environ  # the name of the first pod is known when that pod is scheduled
    resolve_timeout_s = timeout_s if is_pod else RESOLVE_TIMEOUT_S
    for attempt in itertools.count(1):
        try:
            socket.getaddrinfo(host, port)
            if not is_server:
                socket.create_connection((host, port), timeout=min(5.0, timeout_s)).close()
            return
        except (socket.gaierror, UnicodeError) as error:
            if attempt > 1 and time.monotonic() - started > resolve_timeout_s:  # a name server may fail once
                raise RankError(
                    f"the host name {host} of rank 0 cannot be resolved on {socket.gethostname()} ({error}); set "
                    "MASTER_ADDR, or on that node torchrun's --local-addr, to an address that all nodes know"
                ) from error
            time.sleep(0.5)
        except OSError as error:
            if time.monotonic() - started > timeout_s:
                raise RankError(
                    f"{env} cannot connect to rank 0 at {host}:{port}: {error.strerror or error}; check that "
                    "MASTER_ADDR is rank 0's host, that rank 0 has started, and that the port is open"
                ) from error
            time.sleep(0.1)


def register(store: Store, env: DistributedEnvironment, timeout_s: float, setting: str) -> Store:
    """Register this rank, wait for all others, and return the part of ``store`` that only this start uses.

    torchrun keeps one store over all restarts (seen with torch 2.14), so it may contain the addresses of ranks that
    have exited. Rank 0 therefore creates a new prefix, under which the other ranks register with a nonce. Rank 0
    returns the nonces; under an old prefix it does not.
    """
    deadline, nonce = time.monotonic() + timeout_s, uuid.uuid4().hex
    keys = [host_key(rank) for rank in range(env.world_size)]
    entry = f"{nonce} {socket.gethostname()}"
    if env.rank == 0:
        start = PrefixStore(f"distlenet/{nonce}", store)
        start.set(host_key(0), entry)
        store.set("distlenet/start", nonce)
        wait_for_ranks(start, keys, deadline, env, setting)
        start.set("nonces", json.dumps([value.decode().split()[0] for value in start.multi_get(keys)]))
        return start
    while True:
        wait_for_ranks(store, ["distlenet/start"], deadline, env, setting)
        start = PrefixStore(f"distlenet/{store.get('distlenet/start').decode()}", store)
        start.set(host_key(env.rank), entry)
        with contextlib.suppress(dist.DistStoreError):  # not all have registered, or the prefix is old: read it again
            start.wait(["nonces"], timedelta(seconds=1))
            if nonce in json.loads(start.get("nonces")):
                return start
            time.sleep(0.02)
        if time.monotonic() > deadline:
            wait_for_ranks(start, keys, deadline, env, setting)
            raise RankError(f"{env}: rank 0 does not respond; check that its process is running")


def wait_for_ranks(
    store: Store,
    keys: list[str],
    deadline: float,
    env: DistributedEnvironment,
    setting: str,
    answer: str | None = None,
) -> None:
    """Wait for the key of each rank, or for rank 0's ``answer`` to all of them.

    Raise RankError that names the ranks whose keys are missing after ``deadline``, or else rank 0.
    """
    try:
        store.wait([answer] if answer else keys, timedelta(seconds=max(0.01, deadline - time.monotonic())))
    except dist.DistStoreError as error:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])] or [0]
        raise RankError(
            f"{env}: {format_ranks(missing)} did not join in time ({setting}); check that their nodes are up and can "
            "connect to the node of rank 0"
        ) from error


def host_key(rank: int) -> str:
    """Return the store key under which a rank registers its host name."""
    return f"host/{rank}"


def host_of(store: Store, rank: int) -> str:
    """Return the host name of a registered rank."""
    return store.get(host_key(rank)).decode().partition(" ")[2]


def format_ranks(ranks: Sequence[int], limit: int = 16) -> str:
    """Return ``rank 3``, ``ranks 3, 5, 6``, or the first ``limit`` ranks and how many more."""
    listed = ", ".join(str(rank) for rank in ranks[:limit]) + f" and {len(ranks) - limit} more" * (len(ranks) > limit)
    return f"rank{'s' * (len(ranks) != 1)} {listed}"


def call_with_timeout(function: Callable[[], T], timeout_s: float) -> T:
    """Return ``function()``, called in a daemon thread. Raise TimeoutError if it has not returned in time."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:  # raised in the calling thread
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result.result(timeout_s)


@contextmanager
def convert_rendezvous_errors(env: DistributedEnvironment) -> Iterator[None]:
    """Raise RankError for the errors of torch that mean the ranks cannot connect."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            used = f"port {env.master_port} on {socket.gethostname()} is in use"
            raise RankError(f"{used}; set MASTER_PORT to a free port for all ranks, or end that process") from error
        if "find address for" in str(error):  # Gloo
            known = ", ".join(name for _, name in socket.if_nameindex())
            raise RankError(
                f"GLOO_SOCKET_IFNAME={os.environ.get('GLOO_SOCKET_IFNAME', '')}: {socket.gethostname()} has no such "
                f"network interface with an address; set one of {known}, or unset it"
            ) from error
        if isinstance(error, RuntimeError) and not isinstance(error, dist.DistError):
            raise  # not about connections
        raise RankError(
            f"{env} could not connect to {env.master_addr}:{env.master_port}: {str(error).splitlines()[0]}; check that "
            f"MASTER_ADDR and MASTER_PORT are those of {'the agent of ' * env.agent_store}rank 0"
        ) from error
