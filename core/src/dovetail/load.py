"""A measuring client for streamed completions: many connections, one thread, raw sockets, nothing parsed that is not needed.

It shares the machine with the server that it measures, so what it costs is taken from the server.
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
from urllib.request import urlopen

from dovetail.errors import ConfigError

RECEIVE = 1 << 16
_EVENT, _END = b"data: {", b"\r\n0\r\n\r\n"
"""The start of an event, and the end of a chunked body."""


@dataclass
class Measured:
    """Times in seconds."""

    seconds: float = 0.0
    """From the first request to the end of the last answer."""
    ttft: list[float] = field(default_factory=list)
    """Per request, from sending it to its first event."""
    gaps: list[float] = field(default_factory=list)
    """Between two deliveries of one stream; events that arrive together are one delivery."""
    num_events: int = 0


class _Client:
    """One connection, with one request at a time."""

    def __init__(self, address: tuple[str, int], requests: Iterator[bytes], measured: Measured) -> None:
        self.sock = socket.create_connection(address)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._requests = requests
        self._measured = measured
        self._head = b""
        self._tail = b""
        self._began = self._last = 0.0

    def send(self) -> bool:
        """Send the next request; False if there is none."""
        request = next(self._requests, None)
        if request is None:
            return False
        self._head = self._tail = b""
        self._last = 0.0
        self._began = time.perf_counter()
        self.sock.sendall(request)
        return True

    def receive(self) -> bool:
        """Take what has come; True at the end of the answer."""
        data = self.sock.recv(RECEIVE)
        now = time.perf_counter()
        if len(self._head) < 12:
            self._head += data[:12]
            if len(self._head) >= 12 and not self._head.endswith(b" 200"):
                raise ConfigError(f"the server answered {(self._head + data[12:]).decode(errors='replace')[:1000]}")
        if not data:
            raise ConfigError("the server closed a connection in the middle of an answer")
        num_events = data.count(_EVENT)
        if num_events:
            self._measured.num_events += num_events
            if self._last:
                self._measured.gaps.append(now - self._last)
            else:
                self._measured.ttft.append(now - self._began)
            self._last = now
        self._tail = (self._tail + data)[-len(_END) :]
        return self._tail == _END


def drive(url: str, bodies: list[dict[str, Any]], concurrency: int) -> Measured:
    """Send completions, `concurrency` at a time, and read their streams to the end. Raises `ConfigError` if one fails."""
    parts = urlsplit(url)
    address = (parts.hostname or "127.0.0.1", parts.port or 80)
    requests = iter([_encode(parts.netloc, body) for body in bodies])
    measured = Measured()
    with selectors.DefaultSelector() as selector:
        clients = [_Client(address, requests, measured) for _ in range(min(concurrency, len(bodies)))]
        try:
            began = time.perf_counter()
            for client in clients:
                selector.register(client.sock, selectors.EVENT_READ, client)
                client.send()
            num_busy = len(clients)
            while num_busy:
                for key, _ in selector.select():
                    if key.data.receive() and not key.data.send():
                        num_busy -= 1
            measured.seconds = time.perf_counter() - began
        finally:
            for client in clients:
                client.sock.close()
    return measured


def served_model(url: str) -> str:
    """The name of the model that a server serves. Raises `ConfigError` if there is no server."""
    try:
        with urlopen(f"{url}/v1/models", timeout=10) as response:
            return str(json.load(response)["data"][0]["id"])
    except (OSError, ValueError, LookupError) as e:
        raise ConfigError(f"no server at {url}: {e}") from None


def _encode(host: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data
