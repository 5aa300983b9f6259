"""Start real servers: `dovetail serve` in its own process, with the simulated worker."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from dovetail_testing.plugin import SIMULATED, install, make_model

PATIENCE = 30
"""Timeout of every wait in seconds. No wait here takes a tenth of it."""


@dataclass
class Served:
    """A running server."""

    process: subprocess.Popen[str]
    log: Path
    url: str = ""

    def client(self, **kwargs: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE, **kwargs)

    def connect(self) -> socket.socket:
        """Open a raw connection, for bytes that no HTTP client would send."""
        url = httpx.URL(self.url)
        return socket.create_connection((url.host, url.port or 0), timeout=PATIENCE)

    @staticmethod
    def until_closed(sock: socket.socket) -> bytes:
        """Return everything that the server sends until it closes the connection."""
        said = b""
        try:
            while part := sock.recv(65536):
                said += part
        except ConnectionResetError:
            pass
        return said

    def wait_ready(self) -> None:
        self.until(lambda: "\nReady: http" in self.output())
        match = re.search(r"Ready: (\S+)", self.output())
        assert match is not None
        self.url = match[1]

    def output(self) -> str:
        return self.log.read_text()

    def until(self, condition: Callable[[], bool]) -> None:
        limit = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < limit, f"timed out; output of the server:\n{self.output()}"
            assert self.process.poll() is None, f"the server exited:\n{self.output()}"
            time.sleep(0.01)

    def metrics(self) -> dict[str, float]:
        """Return the metrics by sample name. Labels other than `model_name` follow in braces."""
        found = {}
        for family in text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text):
            for s in family.samples:
                labels = ",".join(v for k, v in s.labels.items() if k != "model_name")
                found[s.name.removeprefix("dovetail:") + (f"{{{labels}}}" if labels else "")] = (
                    s.value
                )
        return found

    def quiet(self) -> bool:
        m = self.metrics()
        return (
            m["num_requests_running"] == m["num_requests_waiting"] == m["kv_cache_usage_perc"] == 0
        )

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send the signal and wait. Returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(PATIENCE)


Start = Callable[..., Served]


@pytest.fixture(scope="session")
def start_any(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start servers from engine configs. Servers that still run at the end of the session are
    killed."""
    root = tmp_path_factory.mktemp("servers")
    install(root / "site")
    path = os.pathsep.join(filter(None, (str(root / "site"), os.environ.get("PYTHONPATH"))))
    environ = {**os.environ, "PYTHONPATH": path}
    model = make_model(root / "model")
    started: list[Served] = []

    def start(
        *flags: str,
        wait: bool = True,
        server: dict[str, Any] | None = None,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        **values: Any,
    ) -> Served:
        log = root / f"log-{len(started)}.txt"
        config = root / f"config-{len(started)}.yaml"
        data = {
            "model": str(model),
            "served_model_name": "sim",
            "device": "cpu",
            **SIMULATED,
            **values,
        }
        config.write_text(
            yaml.safe_dump({**data, **({"server": {"use": "openai", **server}} if server else {})})
        )
        # the entry point of the installed command
        main = "import sys; from dovetail.cli.main import main; sys.exit(main())"
        command = [
            sys.executable,
            "-P",
            "-c",
            main,
            "serve",
            "--config",
            str(config),
            "--port",
            "0",
            *flags,
        ]
        with log.open("w") as out:
            process = subprocess.Popen(
                command,
                env=environ | (env or {}),
                cwd=cwd,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
            )
        served = Served(process, log)
        started.append(served)
        if wait:
            served.wait_ready()
        return served

    yield start
    for served in started:
        if served.process.poll() is None:
            served.process.kill()
            served.process.wait()


@pytest.fixture
def start(start_any: Start) -> Iterator[Start]:
    """Start servers that end with the test."""
    own: list[Served] = []

    def begin(*flags: str, **values: Any) -> Served:
        own.append(start_any(*flags, **values))
        return own[-1]

    yield begin
    for served in own:
        if served.process.poll() is None:
            served.process.kill()
            served.process.wait()


@pytest.fixture(scope="session")
def server(start_any: Start) -> Iterator[Served]:
    """A server that many tests share. At the end, no request may be left in it and its log must
    contain no errors."""
    served = start_any()
    yield served
    served.until(served.quiet)
    assert served.stop() == 0
    said = served.output()
    assert "Traceback" not in said, said
    assert "ERROR" not in said, said


@pytest.fixture
def http(server: Served) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client
