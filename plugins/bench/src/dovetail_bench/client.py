"""Measure streamed completions with a minimal client: many connections, one thread, raw sockets, no
unnecessary parsing.

The client shares the machine with the server that it measures, so its cost is taken from the
server.
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from dovetail.errors import ConfigError

RECEIVE = 1 << 16
_EVENT, _END = b"data: {", b"\r\n0\r\n\r\n"
"""The start of an event, and the end of a chunked body."""
_NO_TEXT = (b'"text":""', b'"text": ""', b'"choices":[]', b'"choices": []')
"""Substrings of events without text: half a character, or the usage."""


@dataclass
class Measured:
    """The result of a measurement. Times are in seconds."""

    seconds: float = 0.0
    """Time from the first request to the end of the last response."""
    ttft: list[float] = field(default_factory=list)
    """Time from sending a request to its first event, per request."""
    gaps: list[float] = field(default_factory=list)
    """Times between two deliveries of one stream. Events that arrive together are one delivery."""
    num_events: int = 0


class _Client:
    """A client with one connection and one request at a time."""

    def __init__(
        self,
        address: tuple[str, int],
        requests: Iterator[bytes],
        measured: Measured,
        selector: selectors.BaseSelector,
    ) -> None:
        self._address, self._requests, self._measured, self._selector = (
            address,
            requests,
            measured,
            selector,
        )
        self._head = self._tail = self._request = b""
        self._start = self._last = 0.0
        self._kept = False
        """True if the connection has served a request and is kept alive."""
        self._connect()

    def _connect(self) -> None:
        self._sock = socket.create_connection(self._address)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._selector.register(self._sock, selectors.EVENT_READ, self)

    def close(self) -> None:
        """Close the connection. Can be called repeatedly."""
        if self._sock.fileno() >= 0:
            self._selector.unregister(self._sock)
            self._sock.close()

    def send(self) -> bool:
        """Send the next request. Returns False if there is none."""
        request = next(self._requests, None)
        if request is None:
            return False
        self._request = request
        self._head = self._tail = b""
        self._last = 0.0
        self._start = time.perf_counter()
        self._sock.sendall(request)
        return True

    def _send_again(self) -> None:
        """Send the request again on a new connection: some servers close a keep-alive connection
        just as the next request is sent."""
        self.close()
        self._connect()
        self._sock.sendall(self._request)

    def receive(self) -> bool:
        """Receive data. Returns True at the end of the response."""
        try:
            data = self._sock.recv(RECEIVE)
        except ConnectionResetError:
            data = b""
        now = time.perf_counter()
        if data and len(self._head) < 12:
            self._head = (self._head + data)[:12]
            if len(self._head) >= 12 and not self._head.endswith(b" 200"):
                raise ConfigError(f"the server answered {data.decode(errors='replace')[:1000]}")
        if not data and not self._head and self._kept:
            self._kept = False
            self._send_again()
            return False
        if not data:
            raise ConfigError("the server closed a connection before the end of a response")
        num_events = data.count(_EVENT) - sum(map(data.count, _NO_TEXT))
        if num_events:
            self._measured.num_events += num_events
            if self._last:
                self._measured.gaps.append(now - self._last)
            else:
                self._measured.ttft.append(now - self._start)
            self._last = now
        self._tail = (self._tail + data)[-len(_END) :]
        self._kept = self._tail == _END
        return self._kept


def drive(url: str, bodies: list[dict[str, Any]], concurrency: int) -> Measured:
    """Send completion requests, `concurrency` at a time, and read their streams to the end. Raises
    `ConfigError` if one fails."""
    parts = urlsplit(url)
    address = (parts.hostname or "127.0.0.1", parts.port or 80)
    requests = iter([_encode(parts.netloc, body) for body in bodies])
    measured = Measured()
    with selectors.DefaultSelector() as selector:
        clients = [
            _Client(address, requests, measured, selector)
            for _ in range(min(concurrency, len(bodies)))
        ]
        try:
            start = time.perf_counter()
            for client in clients:
                client.send()
            num_busy = len(clients)
            while num_busy:
                for key, _ in selector.select():
                    if key.data.receive() and not key.data.send():
                        key.data.close()
                        num_busy -= 1
            measured.seconds = time.perf_counter() - start
        finally:
            for client in clients:
                client.close()
    return measured


def _encode(host: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data
