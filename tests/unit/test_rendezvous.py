"""Ranks that cannot meet, and say why: nobody there, somebody else there, a port that is taken."""

import socket
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from distlenet.distributed import address
from distlenet.distributed.address import wait_for_port
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.distributed.rendezvous import convert_rendezvous_errors, in_time, open_store
from distlenet.utils.errors import RankError

pytestmark = pytest.mark.unit


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def at(port, rank=1):
    return DistributedEnvironment(rank=rank, world_size=2, init_method=f"tcp://127.0.0.1:{port}")


def test_nobody_listens(listener):
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    with pytest.raises(
        RankError, match=rf"cannot reach rank 0 at 127\.0\.0\.1:{free}: Connection refused; look whether"
    ):
        wait_for_port("127.0.0.1", free, time.monotonic() + 0.3, at(free))
    wait_for_port("127.0.0.1", listener, time.monotonic() + 5, at(listener))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["no.such.host.invalid", "n" * 64])
def test_a_name_that_nobody_knows_is_not_waited_for(monkeypatch, rank, name):
    monkeypatch.setattr(address, "RESOLVE_S", 0.1)
    started = time.monotonic()
    with pytest.raises(RankError, match=f"the name {name}, where the ranks meet, cannot be resolved .* as MASTER_ADDR"):
        open_store(
            DistributedEnvironment(rank=rank, world_size=2, init_method=f"tcp://{name}:1"), timedelta(seconds=600)
        )
    assert time.monotonic() - started < 60  # not those 600 s


def test_a_name_that_is_known_a_moment_later(monkeypatch):
    answers = iter([socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), None])

    def ask(*_):
        if (error := next(answers)) is not None:
            raise error

    monkeypatch.setattr(address.socket, "getaddrinfo", ask)
    address.resolve("n1")
    assert next(answers, "none left") == "none left"


def test_what_listens_is_mute(listener, monkeypatch):
    monkeypatch.setattr("distlenet.distributed.rendezvous.GRACE_S", 0.2)
    with pytest.raises(RankError, match="is not rank 0; set MASTER_PORT to a free port"):
        in_time(lambda: time.sleep(60), timedelta(seconds=0.2), at(listener))


def test_a_port_that_is_taken(listener):
    with (
        pytest.raises(RankError, match=f"port {listener} on .* is in use"),
        convert_rendezvous_errors(at(listener, rank=0)),
    ):
        open_store(at(listener, rank=0), timedelta(seconds=2))


def test_other_failures_are_left_alone():
    with pytest.raises(RuntimeError, match="out of memory"), convert_rendezvous_errors(at(1)):
        raise RuntimeError("out of memory")
    with (
        pytest.raises(RankError, match=r"could not join the others at 127\.0\.0\.1:1: refused"),
        convert_rendezvous_errors(at(1)),
    ):
        raise dist.DistNetworkError("refused\nand much more")


def test_an_interface_that_is_not_there(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    with (
        pytest.raises(RankError, match=r"GLOO_SOCKET_IFNAME=ib7: .* has no such network interface .* it has lo"),
        convert_rendezvous_errors(at(1)),
    ):
        raise RuntimeError("[enforce fail] Unable to find address for: ib7")
