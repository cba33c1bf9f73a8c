"""Can nodes open connections to each other, on ports that nobody has named? Gloo and NCCL need just that."""

import contextlib
import socket
import threading
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed.distributed_c10d import Store

CONNECT_S = 5.0
ALL_PAIRS = 32
"""Nodes up to which each tries each; beyond, those 1, 2, 4, ... places on."""


class Listener:
    """Answers whoever connects with a word, from a thread."""

    def __init__(self, address: str, word: str) -> None:
        """Listen at ``address`` on a port that the system chooses. Raises OSError."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.server = socket.create_server((address, 0), family=family, backlog=128)
        self.port = self.server.getsockname()[1]
        self.word = word
        threading.Thread(target=self._answer, name="preflight", daemon=True).start()

    def _answer(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self.server.accept()
                with connection, contextlib.suppress(OSError):
                    connection.sendall(self.word.encode())

    def close(self) -> None:
        """Listen no more."""
        self.server.close()


def peers_of(node: int, nodes: int) -> list[int]:
    """Choose to which nodes one connects."""
    if nodes <= ALL_PAIRS:
        return [other for other in range(nodes) if other != node]
    return [(node + 2**k) % nodes for k in range((nodes - 1).bit_length())]


def try_peers(store: Store, places: Sequence[int], wait_s: float) -> list[str]:
    """Connect to each of ``places``, node numbers, and say to which that failed, and why.

    Each node has put ``HOST ADDRESS PORT WORD`` into ``listen/NODE`` of the store, or ``HOST - - REASON``.
    """
    failures = []
    for other in places:
        store.wait([f"listen/{other}"], timedelta(seconds=wait_s))
        host, address, port, word = store.get(f"listen/{other}").decode().split(" ", 3)
        if address == "-":
            failures.append(f"{host} cannot listen: {word}")
            continue
        if reason := _try(address, int(port), word):
            failures.append(f"{host} ({address} port {port}): {reason}")
    return failures


def _try(address: str, port: int, word: str) -> str:
    try:
        with socket.create_connection((address, port), timeout=CONNECT_S) as connection:
            connection.settimeout(CONNECT_S)
            heard = b""
            while part := connection.recv(1024):
                heard += part
    except OSError as error:
        return str(error.strerror or error)
    return "" if heard.decode(errors="replace") == word else "something else answers there"
