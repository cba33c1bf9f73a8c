"""A server that loses no request when it is stopped.

uvicorn closes the listening socket and the idle connections at once: the kernel resets connections that it has accepted
and the server has not, and a request that arrives on an idle connection is lost.
"""

import asyncio
import ctypes
import os
import socket
import struct
import traceback
from collections.abc import Callable, Coroutine
from contextlib import suppress
from types import FrameType
from typing import Any, cast

import uvicorn
import uvloop

from distlenet.serve.connections import LimitedProtocol
from distlenet.utils.errors import print_error, warn
from distlenet.utils.startup import print_line, signal_name

HANDSHAKE_S = 0.2  # time for connections that are being established
IDLE_S = 1.0  # seconds without a request after which a connection is closed
TICK_S = 0.02
SO_ATTACH_FILTER = 26  # asm-generic/socket.h
# Classic BPF, (code, jt, jf, k): A = flags of TCP; A &= SYN | ACK; if A == SYN drop, else keep
DROP_SYN = [(0x30, 0, 0, 13), (0x54, 0, 0, 0x12), (0x15, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF)]


class DrainingServer(uvicorn.Server):
    """uvicorn's server; SIGTERM and SIGINT drain it, and a second signal ends the process at once."""

    def __init__(
        self,
        config: uvicorn.Config,
        drain_s: float,
        grace_s: float,
        on_start: Callable[[], None],
        on_drain: Callable[[], None],
        on_exit: Callable[[], None],
    ) -> None:
        """``on_drain`` is called when draining starts, ``drain_s`` seconds before the server stops listening.

        ``on_exit`` is called before the process is ended without unwinding.
        """
        super().__init__(config)
        self.drain_s, self.grace_s = drain_s, grace_s
        self.on_start, self.on_drain, self.on_exit = on_start, on_drain, on_exit

    def run_with(self, sockets: list[socket.socket], *background: Coroutine[Any, Any, None]) -> None:
        """Serve on bound sockets until a signal has drained the server, together with tasks that never end."""

        async def serve() -> None:
            tasks = [asyncio.create_task(coroutine) for coroutine in background]
            for task in tasks:
                task.add_done_callback(self._end_on_failure)
            await self.serve(sockets)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Start to drain, or exit. uvicorn would raise the signal again after a complete drain."""
        if self.should_exit:
            self.on_exit()
            os._exit(128 + sig)
        self.should_exit = True
        print_line(f"{signal_name(sig)}: answering what has arrived, then exiting; a second signal exits at once")

    async def on_tick(self, counter: int) -> bool:
        """Check the time limits of the connections once per second."""
        if counter % 10 == 0:
            self._check_connections()
        return await super().on_tick(counter)

    def _end_on_failure(self, task: "asyncio.Task[None]") -> None:
        """End the process if a background task fails: without it, no request would be answered."""
        if not task.cancelled() and (error := task.exception()) is not None:
            print_error("".join(traceback.format_exception(error)).rstrip())
            self.on_exit()
            os._exit(1)

    def _connections(self) -> list[LimitedProtocol]:
        return cast(list[LimitedProtocol], list(self.server_state.connections))

    def _check_connections(self) -> None:
        now = asyncio.get_running_loop().time()
        for connection in self._connections():
            connection.check(now)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to answer; from here on, a signal drains the server."""
        await super().startup(sockets)
        self.on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain: report that the server is not ready, stop listening, answer all requests, close the connections."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.drain_s + self.grace_s
        self.on_drain()
        cast(type[LimitedProtocol], self.config.http_protocol_class).is_draining = True
        for connection in self._connections():
            if connection.is_busy() and connection.cycle is not None:
                connection.cycle.keep_alive = False
        await asyncio.sleep(self.drain_s)  # balancers notice it and send no more
        for listener in sockets or []:
            refuse_new_connections(listener)
        await asyncio.sleep(HANDSHAKE_S)
        while any(map(backlog, sockets or [])) and loop.time() < deadline:
            await asyncio.sleep(TICK_S)
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        while (connections := self._connections()) and loop.time() < deadline:
            for connection in connections:
                if not connection.is_busy() and loop.time() - connection.last_data > IDLE_S:
                    connection.transport.close()
            await asyncio.sleep(TICK_S)
        if rest := self._connections():
            warn(f"{len(rest)} connections are closed with unfinished requests, after {self.grace_s:g} s")
        for connection in rest:
            connection.transport.abort()
        await asyncio.sleep(TICK_S)  # their requests end as disconnected


def refuse_new_connections(listener: socket.socket) -> None:
    """Let the kernel ignore new connections: their clients try again, and are refused when the socket is closed.

    Connections that are being established, or wait to be accepted, are not affected.
    """
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in DROP_SYN))
    option = struct.pack("HL", len(DROP_SYN), ctypes.addressof(program))  # struct sock_fprog
    try:
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, option)
    except OSError:  # not a Linux kernel: the queue of the kernel becomes as short as possible
        with suppress(OSError):
            listener.listen(0)


def backlog(listener: socket.socket) -> int:
    """Return how many connections the kernel holds for ``accept``."""
    try:
        return int(struct.unpack_from("I", listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 24)[0])
    except OSError:
        return 0
