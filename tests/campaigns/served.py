"""`dovetail serve` in a process of its own, over the simulated worker, and clients that speak HTTP over bare sockets.

The clients cost so little that hundreds of them do not slow down what they measure.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from campaigns.base import plugins
from dovetail.testing.plugin import SIMULATED, make_model

PATIENCE = 60.0
"""Seconds after which a client counts as hung, and a server too."""
COMPLETIONS = "/v1/completions"


@dataclass
class Answer:
    """What came back on one connection; times are of the monotonic clock."""

    sent: float
    """When the head had been sent."""
    first: float = 0.0
    """Of the answer's bytes; 0 if none came."""
    ended: float = 0.0
    status: int = 0
    headers: str = ""
    body: bytes = b""
    is_whole: bool = False
    """All came that the head promised."""
    error: str = ""
    """Why the connection ended, where the server did not end it."""

    def parse(self, raw: bytes) -> None:
        head, found, rest = raw.partition(b"\r\n\r\n")
        if not found:
            return
        self.headers = head.decode("latin-1").lower()
        self.status = int(head.split(b" ", 2)[1])
        if "transfer-encoding: chunked" in self.headers:
            self.body, self.is_whole = _unchunked(rest)
        else:
            length = re.search(r"content-length: (\d+)", self.headers)
            self.body, self.is_whole = rest, length is not None and len(rest) == int(length[1])

    def events(self) -> list[Any]:
        """Of a stream: its data, `[DONE]` as a string."""
        parts = [p.removeprefix("data: ") for p in self.body.decode().split("\n\n") if p]
        return [p if p == "[DONE]" else json.loads(p) for p in parts]

    def num_tokens(self) -> int:
        """Completion tokens of an answer that is whole, its usage asked for; -1 of one that failed or is not whole."""
        if self.status != 200 or not self.is_whole:
            return -1
        if "text/event-stream" not in self.headers:
            return int(json.loads(self.body)["usage"]["completion_tokens"])
        *events, done = self.events()
        if done != "[DONE]" or not events or not events[-1].get("usage"):
            return -1
        return int(events[-1]["usage"]["completion_tokens"])


def _unchunked(rest: bytes) -> tuple[bytes, bool]:
    body = b""
    while True:
        size, found, rest = rest.partition(b"\r\n")
        if not found or len(rest) < int(size, 16) + 2:
            return body, False
        if int(size, 16) == 0:
            return body, True
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]


async def ask(port: int, body: dict[str, Any], *, path: str = COMPLETIONS, leave_after: float | None = None) -> Answer:
    """POST and read to the end. A client that leaves closes its connection after some seconds."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    answer, raw, writer = Answer(time.monotonic()), b"", None
    try:
        async with asyncio.timeout(leave_after or PATIENCE):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head.encode() + b"Connection: close\r\n\r\n" + data)
            await writer.drain()
            answer.sent = time.monotonic()
            while piece := await reader.read(1 << 16):
                answer.first = answer.first or time.monotonic()
                raw += piece
    except TimeoutError:
        answer.error = "left" if leave_after is not None else "hung"
    except OSError as e:
        answer.error = type(e).__name__
    finally:
        if writer is not None:
            writer.close()
    answer.ended = time.monotonic()
    answer.parse(raw)
    return answer


@dataclass
class Served:
    """A running server."""

    process: subprocess.Popen[str]
    log: Path
    port: int = 0

    def wait_ready(self) -> None:
        self.until(lambda: "\nReady: http" in self.output(), "the server is ready")
        match = re.search(r"Ready: \S+:(\d+)", self.output())
        assert match is not None, self.output()
        self.port = int(match[1])

    def output(self) -> str:
        return self.log.read_text()

    def engine_pids(self) -> list[int]:
        pid = self.process.pid
        try:
            return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            return []

    def until(self, condition: Callable[[], bool], what: str) -> None:
        limit = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < limit, f"waited in vain until {what}; the server said:\n{self.output()[-2000:]}"
            assert self.process.poll() is None, f"the server ended:\n{self.output()[-2000:]}"
            time.sleep(0.01)

    def stop(self) -> int:
        """Ask it to stop, and wait; returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)

    def metrics(self) -> dict[str, float]:
        """Samples by name, without their labels."""
        import urllib.request

        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=PATIENCE) as found:
            lines = [line for line in found.read().decode().splitlines() if not line.startswith("#")]
        return {re.sub(r"\{.*\}", "", line).split()[0].removeprefix("dovetail:"): float(line.split()[-1]) for line in lines}

    def is_quiet(self) -> bool:
        m = self.metrics()
        return m["num_requests_running"] == m["num_requests_waiting"] == m["kv_cache_usage_perc"] == 0

    def check_log(self) -> None:
        """Nothing that nobody expected has been raised."""
        assert "Traceback" not in self.output(), self.output()[-3000:]


Serve = Callable[..., Served]


@contextlib.contextmanager
def servers() -> Iterator[Serve]:
    """Starts servers by the settings of their engines; what is left of them at the end is killed."""
    with tempfile.TemporaryDirectory() as name, plugins(Path(name) / "site"):
        folder, started = Path(name), list[Served]()
        model = make_model(folder / "model")

        def serve(**values: Any) -> Served:
            config, log = folder / f"config-{len(started)}.yaml", folder / f"log-{len(started)}.txt"
            settings = {"model": str(model), "served_model_name": "sim", "device": "cpu", **SIMULATED, **values}
            config.write_text(yaml.safe_dump(settings))
            command = [sys.executable, "-m", "dovetail.cli.main", "serve", "--config", str(config), "--port", "0"]
            with log.open("w") as out:
                served = Served(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, text=True), log)
            started.append(served)
            served.wait_ready()
            return served

        try:
            yield serve
        finally:
            for served in started:
                if served.process.poll() is None:
                    served.process.kill()
                    served.process.wait()
