"""Connections to an object store through fsspec, and how often they repeat a request.

Four layers repeat requests: s3fs, botocore, aiohttp, and this package. A repeated PUT of a process that was suspended
may overwrite what another job wrote in between, so uploads use a connection in which only this package repeats.
"""

import asyncio
import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

BEFORE_SEND: ContextVar[Callable[[], None]] = ContextVar("before_send", default=lambda: None)
"""Called, and may raise, immediately before an upload sends a request: preparing it may take a second."""
PART_DELAYS_S = (0.1, 0.4, 1.6)


def connect(url: str, once: bool = False) -> tuple[Any, str]:
    """Return fsspec's object for a URL, and the path in it; with ``once``, requests to S3 are not repeated.

    Raise ImportError if no package for the scheme is installed, ValueError if there is none.
    """
    from fsspec.core import url_to_fs  # takes time, and most runs do not need it

    options: dict[str, Any] = {"use_listings_cache": False}  # another job may write
    if not url.startswith("s3:"):
        return url_to_fs(url, **options)  # type: ignore[no-any-return]
    config: dict[str, Any] = {"retries": {"total_max_attempts": 1 if once else 3}}
    if once:
        config |= _session_options()
    # Parts of 50 MB of a file are sent at once: two of them, not ten, because they are in memory.
    fs, root = url_to_fs(url, max_concurrency=2, config_kwargs=config, **options)
    if once and fs.retries != 1:  # fsspec returns the same object for all URLs
        fs.retries = 1
        _repeat_parts(fs)
    return fs, root


@functools.cache  # fsspec compares options
def _session_options() -> dict[str, Any]:
    """Return the options with which aiohttp does not repeat a request, and calls ``BEFORE_SEND``."""
    from aiobotocore.httpsession import AIOHTTPSession

    if not hasattr(AIOHTTPSession, "_get_session"):  # an older version, which has no such option
        return {}

    class Session(AIOHTTPSession):  # type: ignore[misc]  # has no types
        async def send(self, request: Any) -> Any:
            BEFORE_SEND.get()()
            return await super().send(request)

        async def _get_session(self, *args: Any) -> Any:
            session = await super()._get_session(*args)
            session._retry_connection = False
            return session

    return {"http_session_cls": Session}


def _repeat_parts(fs: Any) -> None:
    """Let s3fs repeat the parts of a large file, which change no object until the last request."""
    send_once = fs._call_s3

    async def send(method: str, *args: Any, **kwargs: Any) -> Any:
        for delay_s in PART_DELAYS_S if method == "upload_part" else ():
            try:
                return await send_once(method, *args, **kwargs)
            except OSError:
                await asyncio.sleep(delay_s)
        return await send_once(method, *args, **kwargs)

    fs._call_s3 = send
