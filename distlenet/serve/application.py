"""The ASGI application: finds the endpoint, checks the token, reads the body, answers, and counts.

It has no framework: benchmarks/serving.py compares it with FastAPI.
"""

import hmac
import re
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from distlenet.serve.endpoints import Endpoint
from distlenet.serve.messages import SMALL, ClientDisconnected, HttpError, Receive, Request, overloaded
from distlenet.serve.request_metrics import RequestMetrics
from distlenet.utils.errors import print_error

VERSION = re.compile(r"^(/v[12]/models/[^/:]+)/versions/([0-9]{1,18})(?=[/:]|$)")
LARGE_BODIES = 16  # number of bodies of the largest size that are in memory at once
UNKNOWN = "other"  # the endpoint of paths that do not exist, in the metrics

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Application:
    """Answers requests. Every error of a client is an answer with a 4xx status, never a traceback."""

    def __init__(
        self,
        name: str,
        table: dict[str, dict[str, Endpoint]],
        metrics: RequestMetrics,
        *,
        max_body: int,
        token: bytes | None = None,
    ) -> None:
        """``name`` is the model's; ``table`` is {path: {method: endpoint}}; ``max_body`` is in bytes."""
        self.name = name
        self.table, self.metrics, self.max_body, self.token = table, metrics, max_body, token
        self.large_bytes = 0  # in memory, of all bodies above SMALL

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request, as ASGI defines it."""
        started, name = time.perf_counter(), UNKNOWN
        request = Request(scope["method"], scope["path"], scope["query_string"], scope["headers"], receive=receive)
        try:
            endpoint = self.find(request)
            name = endpoint.name
            if self.token is not None and not endpoint.is_public:
                self._check_token(request)
            if request.method == "POST":
                self._check_header(request)
                request.body = await self._read_body(request, receive)
            response = await endpoint.handler(request)
        except HttpError as error:
            response = error.response()
        except ClientDisconnected:
            self.metrics.observe(name, 499, time.perf_counter() - started)  # as nginx counts it
            return
        except Exception as error:  # a bug of the server
            print_error("".join(traceback.format_exception(error)).rstrip())
            response = HttpError(500, "internal error; the log of the server describes it").response()
        finally:
            self.large_bytes -= request.reserved
        headers = [
            (b"content-type", response.content_type),
            (b"content-length", str(len(response.body)).encode()),
            *response.headers,
        ]
        if response.status >= 400 and request.header(b"expect"):
            headers.append((b"connection", b"close"))  # the client may send the body, or not
        status = response.status
        try:
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": response.body})
        except ClientDisconnected:
            status = 499
        self.metrics.observe(name, status, time.perf_counter() - started)

    def find(self, request: Request) -> Endpoint:
        """Return the endpoint of a request, and set its version. Raise HttpError 404 or 405."""
        methods = self.table.get(request.path)
        if methods is None and (match := VERSION.match(request.path)):
            request.version = int(match[2])
            methods = self.table.get(match[1] + request.path[match.end() :])
        if methods is None:
            raise HttpError(
                404, f"no such path or model: this server has the model {self.name}; GET /docs lists the paths"
            )
        method = "GET" if request.method == "HEAD" else request.method
        if method not in methods:
            allowed = ", ".join(methods)
            raise HttpError(405, f"expected {allowed}", ((b"allow", allowed.encode()),))
        return methods[method]

    def _check_token(self, request: Request) -> None:
        scheme, _, value = request.header(b"authorization").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(value.strip(), self.token or b""):
            raise HttpError(401, "expected the header Authorization: Bearer TOKEN", ((b"www-authenticate", b"Bearer"),))

    def _check_header(self, request: Request) -> None:
        """Check the size of the body that the client has announced."""
        encoding = request.header(b"content-encoding").lower()
        if encoding not in (b"", b"identity"):
            raise HttpError(415, "Content-Encoding: compressed bodies are not supported")
        text = request.header(b"content-length")
        size = int(text) if text.isdigit() and len(text) < 19 else 0
        if size > self.max_body:
            raise self._too_large()
        if size > SMALL:
            self._check_memory(size)

    def _check_memory(self, size: int) -> None:
        if self.large_bytes + size > LARGE_BODIES * self.max_body:
            raise overloaded("too many large requests at once; send this request again later")

    async def _read_body(self, request: Request, receive: Receive) -> bytes:
        """Return the whole body. Raise HttpError as soon as it is too large, ClientDisconnected if it is cut off.

        A body above SMALL takes its part of the shared limit as its bytes arrive: slow clients do not take it.
        """
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnected
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.max_body:
                raise self._too_large()
            if size > SMALL:
                self._check_memory(size - request.reserved)
                self.large_bytes += size - request.reserved
                request.reserved = size
            if not message.get("more_body", False):
                return parts[0] if len(parts) == 1 else b"".join(parts)

    def _too_large(self) -> HttpError:
        return HttpError(413, f"the body is larger than {self.max_body:,} bytes; see --max-body-mb")
