"""Limits of a connection: the size of headers, and time for clients that send slowly or not at all."""

import asyncio
from collections import deque
from collections.abc import MutableMapping
from contextlib import suppress
from functools import partial
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from distlenet.serve.messages import ClientDisconnected

SILENCE_S = 30.0  # the longest pause within a request, also before the first one
REQUEST_S = 300.0  # the longest time in which a client sends a request
KEEP_ALIVE_S = 75  # between two requests; longer than the 60 s of usual load balancers
MAX_HEAD = 64 * 1024  # bytes of the request line and the headers
RAW_FACTOR = 4  # bytes on the wire per byte of a body: small chunks have long descriptions
MAX_CONNECTIONS = 8192


class HeadTooLargeError(Exception):
    """The request line and the headers of a request are larger than MAX_HEAD."""


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
        self.is_upgrade = False  # the headers of a request ask for another protocol
        self.has_ended = False  # the client sends no more; it may still read
        self.refusal: tuple[int, str] | None = None  # is sent after the answers to earlier requests
        self.unanswered: deque[RequestResponseCycle] = deque()
        self.write_size, self.write_time = 0, self.last_data  # bytes that the client has not read, when they changed
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self.refuse(503, "too many connections")

    def data_received(self, data: bytes) -> None:
        """Parse data, within limits."""
        if self.refusal is not None:
            return
        self.last_data = self.loop.time()
        self.message_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, HeadTooLargeError):
                self.refuse(431, "the headers are too large")
            else:
                self.send_400_response("Invalid HTTP request received.")
        if self.transport.is_closing() or self.refusal is not None:
            return
        self.head_bytes = self.head_bytes + len(data) if self.reads_head else 0
        if self.head_bytes > MAX_HEAD:
            self.refuse(431, "the headers are too large")
        elif self.reads_message and self.message_bytes > RAW_FACTOR * self.max_body + MAX_HEAD:
            self.transport.close()  # chunks of a few bytes, endless trailers, or a body after its refusal

    def _parse(self, data: bytes) -> None:
        """Parse data. A request that asks for another protocol, such as h2c, is parsed again without that header.

        The parser takes the body of such a request for data of the other protocol.
        """
        rest = memoryview(data)
        while True:
            try:
                return self.parser.feed_data(rest)
            except httptools.HttpParserUpgrade as upgrade:
                if not self.is_upgrade:  # the method CONNECT
                    return self.transport.close()
                self.is_upgrade = False
                rest = rest[upgrade.args[0] :]
                version, method = self.parser.get_http_version().encode(), self.parser.get_method()
                lines = [b"%s: %s\r\n" % header for header in self.headers if header[0] != b"upgrade"]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.feed_data(b"%s %s HTTP/%s\r\n%s\r\n" % (method, self.url, version, b"".join(lines)))

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection while complete requests are not answered: the client may have closed only its side."""
        self.has_ended = True
        return self.is_busy() and not self.reads_message

    def connection_lost(self, exc: Exception | None) -> None:
        """End all requests, not only the newest one as uvicorn does."""
        super().connection_lost(exc)
        for cycle in self.unanswered:
            cycle.disconnected = not cycle.response_complete
            cycle.message_event.set()

    def on_message_begin(self) -> None:
        """Note the start of a request."""
        self.message_start, self.message_bytes = self.last_data, 0
        self.reads_head = self.reads_message = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Start to answer a request. While the server drains, the last one of a connection closes it."""
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD:
            raise HeadTooLargeError
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self.is_upgrade = True
            return
        previous = self.cycle
        super().on_headers_complete()
        self.reads_head = False
        while self.unanswered and self.unanswered[0].response_complete:
            self.unanswered.popleft()
        self.unanswered.append(self.cycle)
        if self.is_draining:
            if previous is not None and not previous.response_started and previous is not self.cycle:
                previous.keep_alive = True  # pipelined: answers follow
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """Note the end of a request."""
        if not self.is_upgrade:
            self.reads_message = False
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """Start to answer the next request, or close the connection if there will be none."""
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            if self.refusal is not None:
                self.refuse(*self.refusal)
            elif self.has_ended:
                self.transport.close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        super()._start_asgi_task(cycle, partial(answer, app, cycle))

    def refuse(self, status: int, text: str) -> None:
        """Answer without the application, after earlier requests are answered, and close the connection."""
        if self.cycle is not None and not self.cycle.response_complete and not self._reads_body():
            self.refusal = (status, text)
            self.reads_head = self.reads_message = False
            return
        body = b'{"error":"%s"}' % text.encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Answer a request that is not HTTP, unless its answer has begun."""
        if self._reads_body() and self.cycle.response_started:
            self.transport.close()
        else:
            self.refuse(400, msg)

    def _reads_body(self) -> bool:
        return self.reads_message and not self.reads_head

    def is_busy(self) -> bool:
        """Return whether a request has begun and is not answered."""
        return self.reads_head or (self.cycle is not None and not self.cycle.response_complete)

    def check(self, now: float) -> None:
        """Close the connection if the client does not send, or does not read."""
        silence = now - self.last_data
        size = self.transport.get_write_buffer_size()
        if size == 0 or size != self.write_size:
            self.write_size, self.write_time = size, now
        if now - self.write_time > SILENCE_S:
            self.transport.abort()  # the client does not read its answers
        elif self.transport.is_closing():
            pass
        elif self.reads_message:
            if silence > SILENCE_S or now - self.message_start > REQUEST_S:
                self.transport.abort()
        elif self.cycle is None and silence > SILENCE_S:
            self.transport.close()


async def answer(app: Any, cycle: RequestResponseCycle, scope: Any, receive: Any, send: Any) -> None:
    """Call the application. Its ``send`` raises ClientDisconnected; a cancelled request leaves no traceback."""

    async def send_or_raise(message: MutableMapping[str, Any]) -> None:
        await send(message)
        if cycle.disconnected:
            raise ClientDisconnected

    with suppress(asyncio.CancelledError):  # the grace period is over
        await app(scope, receive, send_or_raise)


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
