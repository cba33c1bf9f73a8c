"""Requests and responses as the endpoints see them, and errors that are answered."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import orjson

JSON = b"application/json"
SMALL = 64 * 1024  # bytes; larger bodies share a limit of memory, and are read in a thread
RETRY_AFTER = ((b"retry-after", b"1"),)
Headers = tuple[tuple[bytes, bytes], ...]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


@dataclass
class Request:
    """A request with its complete body. ``version`` is the number in a path with ``/versions/N``, else None.

    ``receive`` is the function of ASGI: after the body, it returns when the client disconnects.
    """

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes = b""
    version: int | None = None
    receive: Receive | None = None
    reserved: int = 0  # bytes that the body takes of the limit of all large ones

    def header(self, name: bytes) -> bytes:
        """Return the value of a header, or b""; ``name`` is in lower case."""
        return next((value for key, value in self.headers if key == name), b"")


@dataclass(frozen=True)
class Response:
    """Status, body and headers of an answer."""

    body: bytes
    status: int = 200
    content_type: bytes = JSON
    headers: Headers = field(default=())


class HttpError(Exception):
    """A request that is answered with an error: a 4xx status, or 503 if the server has too much to do."""

    def __init__(self, status: int, text: str, headers: Headers = ()) -> None:
        super().__init__(text)
        self.status, self.headers = status, headers

    def response(self) -> Response:
        """Return the answer: ``{"error": text}``, the form of TensorFlow Serving and of KServe."""
        return json_response({"error": str(self)}, self.status, self.headers)


class ClientDisconnected(Exception):
    """The client has closed its connection before the end of its request."""


def overloaded(text: str) -> HttpError:
    """Return the error of a request that may be repeated later."""
    return HttpError(503, text, RETRY_AFTER)


def json_response(value: Any, status: int = 200, headers: Headers = ()) -> Response:
    """Return a JSON answer. Values may hold NumPy arrays: float32 is printed with the digits that identify it."""
    try:
        body = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError:  # a lone surrogate in a text, such as a name that the client has sent
        body = json.dumps(value).encode()
    return Response(body, status, headers=headers)
