"""Test the contract of the server extension point. A plugin's test is a subclass:

    class TestMyServer(ServerContract):
        provider = PROVIDER

These checks cover only what all servers have in common: their life cycle. Each server runs in a
process of its own, with the simulated worker.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import pytest

from dovetail.assembly.compose import PlanContext
from dovetail.facts import device_facts, model_facts
from dovetail.plugin.config import EngineConfig
from dovetail.plugin.discovery import load_registry
from dovetail.plugin.provider import Provider
from dovetail.runtime.serving import AsyncEngine
from dovetail.types import SamplingParams
from dovetail_testing.contract import Contract, common_causes
from dovetail_testing.plugin import SIMULATED, install, make_model

PATIENCE = 30
"""Seconds after which waiting is a failure; nothing here should take a tenth of this."""
LOOPBACK = "127.0.0.1"


@dataclass
class Running:
    """A server in a process of its own, which reports `begun`, `ready` with its URL, `returned` or
    `raised`."""

    process: BaseProcess
    reports: Connection
    patience: float

    def next(self) -> tuple[str, str]:
        assert self.reports.poll(self.patience), (
            f"the server did not respond within {self.patience} seconds"
        )
        try:
            what, detail = self.reports.recv()
        except EOFError:
            raise AssertionError(
                f"the server process ended with status {self.process.exitcode} without returning"
            ) from None
        return what, detail

    def expect(self, wanted: str) -> str:
        what, detail = self.next()
        assert what == wanted, f"expected {wanted!r}, but got {what!r}: {detail}"
        return detail

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


class ServerContract(Contract):
    """The contract of servers. Subclass it and set `provider`, which must be picklable: its
    functions must be module-level functions."""

    extension_point = "server"
    patience: ClassVar[float] = PATIENCE
    folder: ClassVar[Path]
    running: list[Running]

    def prepare(self) -> None:
        cls, self.running = type(self), []
        if "folder" not in vars(cls):
            cls.folder = Path(tempfile.mkdtemp(prefix="dovetail-"))
            install(cls.folder / "site")
            make_model(cls.folder / "model")

    def teardown_method(self) -> None:
        for running in self.running:
            if running.process.is_alive():
                running.process.kill()
            running.process.join()
            running.reports.close()

    @classmethod
    def teardown_class(cls) -> None:
        if "folder" in vars(cls):
            shutil.rmtree(cls.folder)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
    @common_causes(
        "a signal handler is replaced by the one of the server library",
        "the engine is left open at the end",
    )
    def test_it_serves_until_told_to_stop(self, number: int) -> None:
        """`run` calls `on_ready` once, with a URL that accepts connections, and ends and returns on
        SIGTERM or SIGINT."""
        running = self.start()
        url = urlsplit(running.expect("ready"))
        assert url.hostname, f"on_ready was called with {url.geturl()!r}, which has no host"
        assert url.port, f"on_ready was called with {url.geturl()!r}, which has no port"
        with closing(socket.create_connection((url.hostname, url.port), timeout=PATIENCE)):
            pass
        running.signal(number)
        running.expect("returned")
        try:
            socket.create_connection((url.hostname, url.port), timeout=PATIENCE).close()
        except ConnectionRefusedError:
            return
        raise AssertionError(f"run has returned, but {url.geturl()} still accepts connections")

    @common_causes("signals are handled only after the start")
    def test_it_can_be_stopped_while_it_loads(self) -> None:
        """While the engine loads, the server already accepts connections. If it is stopped then,
        `run` returns without calling `on_ready`."""
        port = free_port()
        running = self.start(port=port, worker={"use": "simulated", "load_seconds": 3600.0})
        wait_for_port(port)
        running.signal(signal.SIGTERM)
        what, detail = running.next()
        assert what != "ready", f"the engine has not loaded, but on_ready was called with {detail}"

    @common_causes(
        "the signal ends the serving loop itself", "the engine is closed before it has drained"
    )
    def test_requests_in_flight_are_finished(self) -> None:
        """On SIGTERM, `run` returns only after requests in flight have been finished."""
        running = self.start(ask=True, worker={"use": "simulated", "step_seconds": 0.05})
        running.expect("ready")
        running.expect("asked")
        running.signal(signal.SIGTERM)
        reason = running.expect("answered")
        assert reason == "length", f"a request in flight ended with {reason}"
        running.expect("returned")

    @common_causes("the library exits or logs a line instead of raising an error")
    def test_a_taken_address_is_an_error(self) -> None:
        """An address in use is a `ConfigError`."""
        with closing(socket.create_server((LOOPBACK, 0))) as in_use:
            kind = self.start(port=in_use.getsockname()[1]).expect("raised").split(":")[0]
            assert kind == "ConfigError", f"run raised {kind}"

    @common_causes("the start is not awaited, so that its error is lost")
    def test_an_engine_that_does_not_start_is_an_error(self) -> None:
        """`run` raises the error that prevents the engine's start."""
        model = make_model(self.folder / "gone")
        running = self.start(model=str(model), gone=str(model))
        kind = running.expect("raised").split(":")[0]
        assert kind in ("CheckpointError", "EngineDead", "EngineUnavailable"), f"run raised {kind}"

    def start(
        self, *, port: int = 0, gone: str | None = None, ask: bool = False, **values: Any
    ) -> Running:
        """Run the server. `gone` is a folder to remove once the engine is configured. With `ask`,
        the engine gets a request as soon as it is ready."""
        config = {"model": str(self.folder / "model"), "device": "cpu", **SIMULATED, **values}
        context = multiprocessing.get_context("spawn")
        reports, theirs = context.Pipe(duplex=False)
        arguments = (
            theirs,
            self.provider,
            self.options,
            config,
            str(self.folder / "site"),
            port,
            gone,
            ask,
        )
        process = context.Process(target=serve, args=arguments)
        process.start()
        theirs.close()
        self.running.append(Running(process, reports, PATIENCE))
        # Starting a process and its imports takes time, independently of the server.
        self.running[-1].expect("begun")
        self.running[-1].patience = self.patience
        return self.running[-1]


def serve(
    reports: Connection,
    provider: Provider[Any],
    options: dict[str, Any],
    config: dict[str, Any],
    site: str,
    port: int,
    gone: str | None,
    ask: bool,
) -> None:
    """Run the server in its process."""
    sys.path.insert(0, site)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (site, os.environ.get("PYTHONPATH"))))
    try:
        engine = AsyncEngine(EngineConfig.model_validate(config))
        context = PlanContext(
            engine.plan, load_registry(), device_facts(), model_facts(Path(engine.plan.folder))
        )
        server = provider.build(context, provider.options.model_validate(options))
        if gone is not None:
            shutil.rmtree(gone)
        reports.send(("begun", ""))
        server.run(
            Asking(engine, reports) if ask else engine,
            LOOPBACK,
            port,
            lambda url: reports.send(("ready", url)),
        )
        reports.send(("returned", ""))
    except BaseException as e:
        reports.send(("raised", f"{type(e).__name__}: {e}"))


class Asking:
    """An engine wrapper that sends a request as soon as the engine has started, in the server's
    event loop."""

    def __init__(self, engine: AsyncEngine, reports: Connection) -> None:
        self._engine, self._reports = engine, reports

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def start(self) -> None:
        await self._engine.start()
        self._task = asyncio.create_task(self._ask())

    async def _ask(self) -> None:
        reason, is_first = "nothing", True
        try:
            async for delta in self._engine.generate(
                "abc", SamplingParams(max_tokens=30, ignore_eos=True, seed=0)
            ):
                if is_first:
                    self._reports.send(("asked", ""))
                is_first, reason = False, delta.finish_reason or reason
        except BaseException as e:
            reason = f"{type(e).__name__}: {e}"
        self._reports.send(("answered", reason))


def free_port() -> int:
    with closing(socket.create_server((LOOPBACK, 0))) as found:
        port: int = found.getsockname()[1]
        return port


def wait_for_port(port: int) -> None:
    """Wait until the port accepts connections."""
    limit = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection((LOOPBACK, port), timeout=PATIENCE).close()
            return
        except OSError as e:
            if time.monotonic() > limit:
                raise AssertionError(
                    f"while the engine loads, the server accepts no connections: {e}"
                ) from None
            time.sleep(0.01)
