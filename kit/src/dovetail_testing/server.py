"""The contract of the server extension point, as tests. A plugin's test is a subclass:

    class TestMyServer(ServerContract):
        provider = PROVIDER

Only what all servers share is asked here: their life. Each runs in a process of its own, over the
simulated worker.
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
"""Seconds after which waiting is a failure. Nothing here takes a tenth of it."""
LOOPBACK = "127.0.0.1"


@dataclass
class Running:
    """A server in a process of its own, and what it reports: `begun`, `ready` with its URL,
    `returned` or `raised`."""

    process: BaseProcess
    reports: Connection
    patience: float

    def next(self) -> tuple[str, str]:
        assert self.reports.poll(self.patience), (
            f"the server did not react within {self.patience} seconds"
        )
        try:
            what, detail = self.reports.recv()
        except EOFError:
            raise AssertionError(
                f"the server's process ended with status {self.process.exitcode}, without returning"
            ) from None
        return what, detail

    def expect(self, wanted: str) -> str:
        what, detail = self.next()
        assert what == wanted, f"{wanted!r} was expected, and it {what}: {detail}"
        return detail

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


class ServerContract(Contract):
    """Subclass, set `provider`, and pytest does the rest. The provider is pickled: its functions
    are a module's own."""

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
        "a handler installed before the server library's own, which replaces it",
        "the engine left open at the end",
    )
    def test_it_serves_until_told_to_stop(self, number: int) -> None:
        """It calls `on_ready` once, with a URL that takes connections, and on SIGTERM or SIGINT it
        ends and returns."""
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
        raise AssertionError(f"it has returned, and {url.geturl()} still takes connections")

    @common_causes("signals that are looked at only after the start")
    def test_it_can_be_stopped_while_it_loads(self) -> None:
        """While the engine loads it takes connections already; told to stop then, it returns, and
        `on_ready` is not called."""
        port = free_port()
        running = self.start(port=port, worker={"use": "simulated", "load_seconds": 3600.0})
        wait_for_port(port)
        running.signal(signal.SIGTERM)
        what, detail = running.next()
        assert what != "ready", (
            f"the engine has loaded nothing, and on_ready was called with {detail}"
        )

    @common_causes(
        "the serving loop ended by the signal itself", "the engine closed before it is drained"
    )
    def test_requests_in_flight_are_finished(self) -> None:
        """On SIGTERM what the engine is working on is finished, and only then it returns."""
        running = self.start(ask=True, worker={"use": "simulated", "step_seconds": 0.05})
        running.expect("ready")
        running.expect("asked")
        running.signal(signal.SIGTERM)
        reason = running.expect("answered")
        assert reason == "length", f"a request that was in flight ended with {reason}"
        running.expect("returned")

    @common_causes("the library's own exit or log line in place of an error")
    def test_a_taken_address_is_an_error(self) -> None:
        """An address that is taken is a `ConfigError`."""
        with closing(socket.create_server((LOOPBACK, 0))) as taken:
            kind = self.start(port=taken.getsockname()[1]).expect("raised").split(":")[0]
            assert kind == "ConfigError", f"it raised {kind}"

    @common_causes("the start awaited nowhere, so that its error is lost")
    def test_an_engine_that_does_not_start_is_an_error(self) -> None:
        """What kept the engine from starting is raised from `run`."""
        model = make_model(self.folder / "gone")
        running = self.start(model=str(model), gone=str(model))
        kind = running.expect("raised").split(":")[0]
        assert kind in ("CheckpointError", "EngineDead", "EngineUnavailable"), f"it raised {kind}"

    def start(
        self, *, port: int = 0, gone: str | None = None, ask: bool = False, **values: Any
    ) -> Running:
        """Run the server; `gone` is a folder to remove once the engine is configured. `ask`: the
        engine gets a request as soon as it is ready."""
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
        self.running[-1].expect(
            "begun"
        )  # a process and its imports take their time, whatever the server does
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
    """In the server's process."""
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
    """An engine that is asked something as soon as it has started, in the server's own event
    loop."""

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
    """Until it takes connections."""
    limit = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection((LOOPBACK, port), timeout=PATIENCE).close()
            return
        except OSError as e:
            if time.monotonic() > limit:
                raise AssertionError(
                    f"while the engine loads, the server takes no connections: {e}"
                ) from None
            time.sleep(0.01)
