"""Limits of a connection: the size of headers, and time for clients that send slowly or not at all."""

import asyncio
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

SILENCE_S = 30.0  # the longest pause within a request, also before the first one
REQUEST_S = 300.0  # the longest time in which a client sends a request
KEEP_ALIVE_S = 75  # between two requests; longer than the 60 s of usual load balancers
MAX_HEAD = 64 * 1024  # bytes of the request line and the headers
RAW_FACTOR = 4  # bytes on the wire per byte of a body: small chunks have long descriptions
MAX_CONNECTIONS = 8192


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with limits that it does not have. ``check`` must be called about once per second."""

    max_body = 0  # bytes; the server sets them before it starts
    is_draining = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start a connection, unless there are too many."""
        self.last_data = self.message_start = self.loop.time()
        self.reads_head = False  # between the first byte of a request and the end of its headers
        self.reads_message = False  # between the first and the last byte of a request
        self.head_bytes = self.message_bytes = 0
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self.refuse(503, "too many connections")

    def data_received(self, data: bytes) -> None:
        """Parse data, within limits."""
        self.last_data = self.loop.time()
        self.message_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        self.head_bytes = self.head_bytes + len(data) if self.reads_head else 0
        if self.head_bytes > MAX_HEAD:
            self.refuse(431, "the headers are too large")
        elif self.reads_message and self.message_bytes > RAW_FACTOR * self.max_body + MAX_HEAD:
            self.transport.close()  # chunks of a few bytes, endless trailers, or a body after its refusal

    def on_message_begin(self) -> None:
        """Note the start of a request."""
        self.message_start, self.message_bytes = self.last_data, 0
        self.reads_head = self.reads_message = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Start to answer a request. While the server drains, the last one of a connection closes it."""
        previous, self.reads_head = self.cycle, False
        super().on_headers_complete()
        if self.is_draining:
            if previous is not None and not previous.response_started and previous is not self.cycle:
                previous.keep_alive = True  # pipelined: answers follow
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """Note the end of a request."""
        self.reads_message = False
        super().on_message_complete()

    def refuse(self, status: int, text: str) -> None:
        """Answer without the application, and close the connection."""
        body = b'{"error":"%s"}' % text.encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Answer a request that is not HTTP, unless an answer has begun."""
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.close()
        else:
            self.refuse(400, msg)

    def is_busy(self) -> bool:
        """Return whether a request has begun and is not answered."""
        return self.reads_head or (self.cycle is not None and not self.cycle.response_complete)

    def check(self, now: float) -> None:
        """Close the connection if the client does not send, or does not read."""
        silence = now - self.last_data
        if self.transport.is_closing():
            if silence > SILENCE_S:
                self.transport.abort()  # the client does not read its answer
        elif self.reads_message:
            if silence > SILENCE_S or now - self.message_start > REQUEST_S:
                self.transport.abort()
        elif self.cycle is None and silence > SILENCE_S:
            self.transport.close()


def make_config(application: Any, max_body: int) -> Config:
    """Return uvicorn's configuration."""
    protocol = type("BoundProtocol", (LimitedProtocol,), {"max_body": max_body})
    return Config(
        application,
        interface="asgi3",
        loop="uvloop",
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
