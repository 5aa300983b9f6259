"""Run the application and the engine together, and shut both down without losing responses."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import logging
import socket
from collections.abc import Callable, Mapping
from types import FrameType

import uvicorn

from dovetail.errors import ConfigError, EngineDead
from dovetail.interfaces.server import EngineClient
from dovetail_server_openai.app import MakeRouter, make_app
from dovetail_server_openai.connections import allow_connections, bounded_protocol
from dovetail_server_openai.failures import Responsible
from dovetail_server_openai.guard import api_keys
from dovetail_server_openai.options import ServerOptions
from dovetail_server_openai.reports import report_load

log = logging.getLogger("dovetail.server")
CLOSE_SECONDS = 5
"""Seconds that a client has to receive the rest of a response after the engine has drained."""


class OpenAIServer:
    """The `Server` interface implemented with uvicorn."""

    def __init__(
        self,
        options: ServerOptions,
        routes: Mapping[str, MakeRouter] | None = None,
        responsible: Responsible | None = None,
    ) -> None:
        self._responsible = responsible
        self._options = options
        self._routes = routes or {}

    def run(
        self, engine: EngineClient, host: str, port: int, on_ready: Callable[[str], None]
    ) -> None:
        sock = _bind(host, port)
        address, bound = sock.getsockname()[:2]
        url = f"http://{f'[{address}]' if ':' in address else address}:{bound}"
        limits = (allow_connections(), self._options.head_timeout, self._options.body_timeout)
        app = make_app(
            engine, self._options, self._routes, self._responsible, keys := api_keys(self._options)
        )
        if not keys and not ipaddress.ip_address(address).is_loopback:
            log.warning(
                "listening on %s without an API key: anyone who can reach the port can use it"
                " (--api-key-file)",
                address,
            )
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=CLOSE_SECONDS,
            http=bounded_protocol(*limits),
            ws="none",
        )

        async def serve() -> None:
            uvicorn_server = _Draining(config, engine, self._options.drain_seconds)
            serving = asyncio.create_task(uvicorn_server.serve(sockets=[sock]))
            starting = asyncio.create_task(engine.start())
            failing = asyncio.create_task(_until_failed(engine, uvicorn_server))
            reporting = asyncio.create_task(report_load(engine))
            try:
                await asyncio.wait({serving, starting}, return_when=asyncio.FIRST_COMPLETED)
                if starting.done():
                    starting.result()
                    gc.freeze()  # objects that live as long as the process need no collection
                    on_ready(url)
                await serving
                if engine.failed.is_set():
                    raise EngineDead(f"the engine failed permanently: {engine.failure}")
            finally:
                failing.cancel()
                reporting.cancel()
                uvicorn_server.should_exit = True
                await serving
                await engine.close()
                await asyncio.gather(
                    starting, return_exceptions=True
                )  # fails if stopped while loading

        with sock, asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(serve())


async def _until_failed(engine: EngineClient, server: uvicorn.Server) -> None:
    """Stop the server when the engine has failed permanently, so that its supervisor can react."""
    await engine.failed.wait()
    server.should_exit = True


class _Draining(uvicorn.Server):
    """uvicorn's server with draining. The first signal rejects new requests with 503, lets requests
    in flight finish, and then stops; the second stops immediately."""

    def __init__(self, config: uvicorn.Config, engine: EngineClient, drain_seconds: float) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_seconds = drain_seconds
        self._loop = asyncio.get_running_loop()
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining is not None:
            self.should_exit = self.force_exit = True
            return
        # A signal handler may run between any two bytecodes, so the event loop does the rest.
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._draining = self._draining or self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        if not await self._engine.drain(self._drain_seconds):
            await self._engine.close()  # the remaining requests fail with an error
        self.should_exit = True


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, OverflowError) as e:
        sock.close()
        reason = e.strerror if isinstance(e, OSError) else e
        raise ConfigError(
            f"cannot listen on {host}:{port}: {reason}; choose another --host or --port"
        ) from None
    return sock
