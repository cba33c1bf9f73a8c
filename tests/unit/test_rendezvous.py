"""The rendezvous of the ranks, and the messages if it fails."""

import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from distlenet.distributed import rendezvous
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.distributed.rendezvous import convert_rendezvous_errors, format_ranks, open_store, register
from distlenet.utils.errors import RankError, UserError

pytestmark = pytest.mark.unit


@pytest.fixture
def listener():
    """The port of a server that never responds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def environment(port, rank=1, host="127.0.0.1"):
    return DistributedEnvironment(rank=rank, world_size=2, master_addr=host, master_port=port)


def test_a_closed_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(RankError, match=rf"cannot connect to rank 0 at 127\.0\.0\.1:{port}: Connection refused; check"):
        open_store(environment(port), timeout_s=0.3)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("host", ["no.such.host.invalid", "n" * 64])
def test_an_unknown_host_name_is_refused_before_the_timeout(monkeypatch, rank, host):
    monkeypatch.setattr(rendezvous, "RESOLVE_TIMEOUT_S", 0.1)
    started = time.monotonic()
    with pytest.raises(RankError, match=f"the host name {host} of rank 0 cannot be resolved .* set MASTER_ADDR"):
        open_store(environment(1, rank, host), timeout_s=600)
    assert time.monotonic() - started < 60


def test_a_host_name_that_resolves_at_the_second_attempt(monkeypatch):
    answers = iter([socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), None])

    def resolve(*_):
        if (error := next(answers)) is not None:
            raise error

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    rendezvous.wait_for_server(environment(1, rank=0, host="n1"), is_server=True, timeout_s=600)
    assert next(answers, "used") == "used"


def test_a_pod_waits_for_the_name_of_the_first_pod(monkeypatch):
    """It is known when that pod is scheduled, which may take longer than a failure of a name server."""
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    monkeypatch.setattr(rendezvous, "RESOLVE_TIMEOUT_S", 0.0)
    monkeypatch.setattr(rendezvous.time, "sleep", lambda _: None)
    answers = iter([True] * 5 + [False])

    def resolve(*_):
        if next(answers):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    rendezvous.wait_for_server(environment(1, rank=0, host="net-0.net"), is_server=True, timeout_s=600)
    assert next(answers, "used") == "used"


def test_a_server_that_is_not_a_store(listener, monkeypatch):
    monkeypatch.setattr(rendezvous, "CONNECT_MARGIN_S", 0.2)
    with pytest.raises(RankError, match=f":{listener} is not rank 0; set MASTER_PORT to a free port"):
        open_store(environment(listener), timeout_s=0.2)


def test_a_port_in_use(listener):
    env = environment(listener, rank=0)
    with pytest.raises(RankError, match=f"port {listener} on .* is in use"), convert_rendezvous_errors(env):
        open_store(env, timeout_s=2)


def test_errors_of_torch():
    env, unreachable = environment(1), r"could not connect to 127\.0\.0\.1:1: refused; check"
    with pytest.raises(RuntimeError, match="out of memory"), convert_rendezvous_errors(env):
        raise RuntimeError("out of memory")
    with pytest.raises(RankError, match=unreachable), convert_rendezvous_errors(env):
        raise dist.DistNetworkError("refused\nand more")


def test_a_network_interface_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    message = r"GLOO_SOCKET_IFNAME=ib7: .* has no such network interface .* set one of lo"
    with pytest.raises(RankError, match=message), convert_rendezvous_errors(environment(1)):
        raise RuntimeError("[enforce fail] Unable to find address for: ib7")


def register_ranks(store, world_size, timeout_s=20.0, ranks=None):
    """Register ranks, each in a thread; return the store, or the error message, of each."""

    def run(rank):
        try:
            return register(store, DistributedEnvironment(rank, 0, world_size), timeout_s, "the.setting")
        except UserError as error:
            return str(error)

    ranks = ranks or range(world_size)
    with ThreadPoolExecutor(world_size) as pool:
        return dict(zip(ranks, pool.map(run, ranks), strict=True))


def test_restarts_with_one_store_never_read_entries_of_earlier_starts():
    store = dist.HashStore()
    for attempt, world_size in enumerate((3, 3, 2, 4, 1, 3)):
        # Rank 0 is the first, the last or in between, while the entries of earlier starts still exist.
        order = [(rank + attempt) % world_size for rank in range(world_size)]
        stores = register_ranks(store, world_size, ranks=order)
        for rank in range(world_size):
            stores[rank].set(f"address/{rank}", f"{attempt}")
        for store_of_rank in stores.values():
            values = store_of_rank.multi_get([f"address/{rank}" for rank in range(world_size)])
            assert values == [f"{attempt}".encode()] * world_size


def test_missing_ranks_are_named():
    for rank, missing in ((0, "ranks 1, 2"), (2, "rank 0")):
        message = register_ranks(dist.HashStore(), 3, timeout_s=0.2, ranks=[rank])[rank]
        assert re.match(rf"rank {rank} of 3 on .*: {missing} did not join in time \(the\.setting\)", message)


def test_a_start_that_failed_does_not_disturb_the_next():
    store = dist.HashStore()
    register_ranks(store, 2, timeout_s=0.2, ranks=[0])  # its prefix remains
    stores = register_ranks(store, 2)
    stores[1].set("x", "new")
    assert stores[0].get("x") == b"new"


def test_format_ranks():
    assert format_ranks([3]) == "rank 3"
    assert format_ranks([3, 5]) == "ranks 3, 5"
    assert format_ranks(range(20), limit=2) == "ranks 0, 1 and 18 more"
