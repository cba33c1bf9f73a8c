"""A client that loads an HTTP server: each connection sends its next request when it has the answer.

``python benchmarks/http_load.py URL FILE... [--connections 64] [--seconds 5]`` prints requests per second and latencies
as JSON. Each FILE is a body, and they are sent in turn. The requests are prepared, and answers are only searched for
their end, so that one core loads a server on another one.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import uvloop


class Connection(asyncio.Protocol):
    """One connection, which sends ``requests`` in turn from the number ``first``."""

    def __init__(self, requests: list[bytes], first: int, latencies: list[float], is_measuring: list[bool]) -> None:
        self.requests, self.number, self.latencies, self.is_measuring = requests, first, latencies, is_measuring
        self.data = b""
        self.started = 0.0
        self.failures = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Send the first request."""
        self.transport = transport
        self.send()

    def send(self) -> None:
        """Send the next request."""
        self.number = (self.number + 1) % len(self.requests)
        self.started = time.perf_counter()
        self.transport.write(self.requests[self.number])

    def data_received(self, data: bytes) -> None:
        """Measure the time of a complete answer, and send the next request."""
        self.data = self.data + data if self.data else data
        head, separator, body = self.data.partition(b"\r\n\r\n")
        if not separator:
            return
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        if len(body) < int(length):
            return
        if self.is_measuring[0]:
            self.latencies.append(time.perf_counter() - self.started)
        self.failures += not head.startswith(b"HTTP/1.1 200")
        self.data = b""
        self.send()

    def connection_lost(self, _: Exception | None) -> None:
        """Count a connection that the server closes."""
        self.failures += self.is_measuring[0]


async def load(url: str, bodies: list[bytes], connections: int, seconds: float) -> dict[str, float]:
    """Load a server for ``seconds``, after a fifth of that time without measurement."""
    parts = urlsplit(url)
    head = f"POST {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\ncontent-length: "
    requests = [f"{head}{len(body)}\r\n\r\n".encode() + body for body in bodies]
    latencies: list[float] = []
    is_measuring = [False]
    protocols = [Connection(requests, number, latencies, is_measuring) for number in range(connections)]
    loop = asyncio.get_running_loop()
    for protocol in protocols:
        await loop.create_connection(lambda protocol=protocol: protocol, parts.hostname, parts.port)
    await asyncio.sleep(seconds / 5)
    is_measuring[0], started = True, time.perf_counter()
    await asyncio.sleep(seconds)
    is_measuring[0], elapsed = False, time.perf_counter() - started
    for protocol in protocols:
        protocol.transport.abort()
    if failures := sum(protocol.failures for protocol in protocols):
        sys.exit(f"{url}: {failures} requests failed")
    hundredths = statistics.quantiles(latencies, n=100)
    return {
        "requests_per_s": len(latencies) / elapsed,
        "p50_ms": 1000 * hundredths[49],
        "p99_ms": 1000 * hundredths[98],
        "max_ms": 1000 * max(latencies),
    }


def main() -> None:
    """Read the arguments, and print the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("bodies", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--connections", type=int, default=64, help="open connections (64)")
    parser.add_argument("--seconds", type=float, default=5.0, help="time to measure (5)")
    arguments = parser.parse_args()
    bodies = [path.read_bytes() for path in arguments.bodies]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(load(arguments.url, bodies, arguments.connections, arguments.seconds))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
