"""Check that nodes can connect to each other on arbitrary ports, as Gloo and NCCL do."""

import contextlib
import json
import secrets
import socket
import threading
from collections.abc import Sequence

from torch.distributed.distributed_c10d import Store

CONNECT_TIMEOUT_S = 5.0
ALL_PAIRS_LIMIT = 32
"""Up to this many nodes, every node connects to every other; beyond, to those at distances 1, 2, 4, ..."""


def publish_listener(store: Store, node_rank: int, address: str) -> socket.socket | None:
    """Listen at ``address`` until the returned socket is closed; send a nonce to whoever connects.

    Publish host, address, port and nonce under ``listener/NODE_RANK``, or host, address, None and the error.
    """
    host, nonce = socket.gethostname(), secrets.token_hex(8)
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = socket.create_server((address, 0), family=family, backlog=128)
    except OSError as error:
        store.set(f"listener/{node_rank}", json.dumps([host, address, None, error.strerror or str(error)]))
        return None

    def serve() -> None:
        with contextlib.suppress(OSError):  # raised by accept after close
            while True:
                connection, _ = server.accept()
                with connection, contextlib.suppress(OSError):
                    connection.sendall(nonce.encode())

    threading.Thread(target=serve, name="preflight", daemon=True).start()
    store.set(f"listener/{node_rank}", json.dumps([host, address, server.getsockname()[1], nonce]))
    return server


def peers_of(node_rank: int, num_nodes: int) -> list[int]:
    """Choose the nodes that one node connects to."""
    if num_nodes <= ALL_PAIRS_LIMIT:
        return [peer for peer in range(num_nodes) if peer != node_rank]
    return [(node_rank + 2**k) % num_nodes for k in range((num_nodes - 1).bit_length())]


def try_peers(store: Store, peers: Sequence[int]) -> list[str]:
    """Connect to the published listener of each node in ``peers``; describe each failure."""
    failures = []
    for peer in peers:
        host, address, port, nonce_or_error = json.loads(store.get(f"listener/{peer}"))
        if port is None:
            failures.append(f"{host} (cannot listen at {address}): {nonce_or_error}")
        elif reason := _connect(address, port, nonce_or_error):
            failures.append(f"{host} ({address} port {port}): {reason}")
    return failures


def _connect(address: str, port: int, nonce: str) -> str:
    """Connect and read; return an error, or "" if the nonce was received."""
    try:
        with socket.create_connection((address, port), CONNECT_TIMEOUT_S) as peer, peer.makefile("rb") as file:
            received = file.read()
    except OSError as error:
        return str(error.strerror or error)
    return "" if received == nonce.encode() else "another program answers on this port"
