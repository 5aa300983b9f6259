"""Limit the number of connections, the size of a request's head, and the time that head and body
may take.

uvicorn's parser accepts heads of any length and waits for them without a timeout, before any route
or key is checked.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
RESERVED_DESCRIPTORS = 128
"""File descriptors reserved for the engine process and its restarts, logs and model files."""
MAX_DESCRIPTORS = 65_536


def allow_connections() -> int:
    """Raise this process's limit on open files as far as permitted. Returns the number of
    connections that it leaves room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
        soft = target
    available = MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    return max(1, available - RESERVED_DESCRIPTORS)


def bounded_protocol(
    max_connections: int, head_timeout: float, body_timeout: float
) -> type[HttpToolsProtocol]:
    """Return uvicorn's protocol class with these limits."""
    limits = {
        "max_connections": max_connections,
        "head_timeout": head_timeout,
        "body_timeout": body_timeout,
    }
    return type("BoundedProtocol", (BoundedProtocol,), limits)


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with limits. A connection that exceeds one gets a one-line error
    response, if no response has begun, and is closed."""

    max_connections: int
    head_timeout: float
    """Seconds for a head, from the start of the connection or from the head's first byte."""
    body_timeout: float
    """Seconds for a body, from the end of its head."""
    _in_head = True
    _num_head_bytes = 0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
            return
        self._start_timer(self.head_timeout, "head")

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            if self._deadline is None:  # the next request of a keep-alive connection
                self._start_timer(self.head_timeout, "head")
            self._num_head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._num_head_bytes > MAX_HEAD_BYTES:
            self._refuse(
                "431 Request Header Fields Too Large",
                f"a request's head may have at most {MAX_HEAD_BYTES} bytes",
            )

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._start_timer(self.body_timeout, "body")
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head, self._num_head_bytes = True, 0
        self._cancel_timer()
        super().on_message_complete()

    def _start_timer(self, seconds: float, what: str) -> None:
        self._cancel_timer()
        message = f"the request's {what} did not arrive within {seconds:g} s"
        self._deadline = self.loop.call_later(seconds, self._refuse, "408 Request Timeout", message)

    def _cancel_timer(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, status: str, message: str) -> None:
        self._cancel_timer()
        if self.transport.is_closing():
            return
        # A response that has already begun is cut off without a message.
        if self.cycle is None or self.cycle.response_complete:
            head = (
                f"HTTP/1.1 {status}\r\nconnection: close\r\ncontent-type: text/plain;"
                " charset=utf-8\r\n"
            )
            self.transport.write(f"{head}content-length: {len(message)}\r\n\r\n{message}".encode())
        self.transport.close()
