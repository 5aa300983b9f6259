"""Implement a minimal server: one prompt per connection, received over HTTP and completed as plain
text.

Try it with `curl --data "import os" localhost:8000`.
"""

from __future__ import annotations

import asyncio
import signal
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING

from dovetail import SamplingParams
from dovetail.errors import ConfigError, DovetailError, InvalidRequest
from dovetail.interfaces.server import EngineClient

if TYPE_CHECKING:
    from my_plugin import MyPluginOptions

MAX_BODY = 2**20
"""Maximum size of a request body in bytes: the cost of a request is bounded before any work."""
PATIENCE = 30
"""Seconds that a client has to send its request."""


class MyPluginServer:
    """A `Server`: `run` returns after a signal has stopped it."""

    def __init__(self, options: MyPluginOptions) -> None:
        self._options = options

    def run(
        self, engine: EngineClient, host: str, port: int, on_ready: Callable[[str], None]
    ) -> None:
        asyncio.run(self._run(engine, host, port, on_ready))

    async def _run(
        self, engine: EngineClient, host: str, port: int, on_ready: Callable[[str], None]
    ) -> None:
        stop_requested = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop_requested.set)
        try:
            listener = await asyncio.start_server(
                lambda r, w: self._answer(engine, r, w), host, port
            )
        except OSError as e:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {e.strerror}; choose another --host or --port"
            ) from None
        # Connections are accepted from here on. Until the engine has loaded, `generate` raises an
        # error that is answered with 503.
        starting, stopping = (
            asyncio.create_task(engine.start()),
            asyncio.create_task(stop_requested.wait()),
        )
        try:
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()  # raises the error that prevents the start
                # With port 0 the system chooses one, which the listening socket knows.
                on_ready(f"http://{host}:{listener.sockets[0].getsockname()[1]}")
                await stop_requested.wait()
                await engine.drain(self._options.drain_seconds)
        finally:
            listener.close()
            stopping.cancel()
            await engine.close()
            await asyncio.gather(starting, stopping, return_exceptions=True)

    async def _answer(
        self, engine: EngineClient, reader: StreamReader, writer: StreamWriter
    ) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                prompt = await _read(reader)
            text = ""
            async for delta in engine.generate(
                prompt, SamplingParams(max_tokens=self._options.max_tokens, temperature=0)
            ):
                text += delta.text
            status = HTTPStatus.OK
        except DovetailError as e:  # every error has an HTTP status
            status, text = HTTPStatus(e.http_status), e.message
        except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError, ValueError):
            status, text = HTTPStatus.BAD_REQUEST, "the request is invalid or has no body"
        body = text.encode()
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: text/plain;"
            " charset=utf-8\r\nConnection: close\r\n"
        )
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        writer.close()


async def _read(reader: StreamReader) -> str:
    """Read the body of a request. Raises `InvalidRequest`, `ValueError` or an error of the
    stream."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    size = int(head.partition("content-length:")[2].partition("\r\n")[0] or 0)
    if not 0 < size <= MAX_BODY:
        raise InvalidRequest(f"the body must have 1 to {MAX_BODY} bytes, and a Content-Length")
    return (await reader.readexactly(size)).decode()
