"""`dovetail serve` over the simulated worker in a process of its own, and clients of raw sockets
that see what really comes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from campaigns.base import plugins
from dovetail_testing.plugin import SIMULATED, make_model

PATIENCE = 60
"""Seconds after which waiting is a failure: a hang."""
COMPLETIONS = "/v1/completions"
HOST = "127.0.0.1"
NAME = "sim"


@dataclass
class Server:
    process: subprocess.Popen[str]
    log: Path
    port: int = 0

    def wait_ready(self) -> None:
        self.until(lambda: "\nReady: http" in self.output())
        found = re.search(r"Ready: http://[^:]+:(\d+)", self.output())
        assert found is not None
        self.port = int(found[1])

    def output(self) -> str:
        return self.log.read_text()

    def until(self, condition: Callable[[], bool]) -> None:
        limit = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < limit, (
                f"waited in vain; the server said:\n{self.output()[-3000:]}"
            )
            assert self.process.poll() is None, f"the server ended:\n{self.output()[-3000:]}"
            time.sleep(0.02)

    def engine_pid(self) -> int:
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert len(children) == 1, f"the server has {len(children)} child processes"
        return int(children[0])

    def resident_mib(self) -> float:
        """Of the front-end, without the engine."""
        found = re.search(
            r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text()
        )
        assert found is not None
        return int(found[1]) / 1024

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)

    def assert_no_traceback(self) -> None:
        said = self.output()
        assert "Traceback" not in said, f"a traceback in the log:\n{said[-3000:]}"


Serve = Callable[..., Server]


@contextlib.contextmanager
def servers() -> Iterator[Serve]:
    """Start servers by their settings; whatever is left at the end is killed."""
    started: list[Server] = []
    with tempfile.TemporaryDirectory() as folder, plugins(Path(folder) / "site"):
        model = make_model(Path(folder) / "model")

        def serve(*flags: str, **values: Any) -> Server:
            log, config = (Path(folder) / f"{len(started)}.{kind}" for kind in ("log", "yaml"))
            settings = {
                "model": str(model),
                "served_model_name": NAME,
                "device": "cpu",
                **SIMULATED,
                **values,
            }
            config.write_text(yaml.safe_dump(settings))
            command = [
                sys.executable,
                "-m",
                "dovetail.cli.main",
                "serve",
                "--config",
                str(config),
                "--port",
                "0",
                *flags,
            ]
            with log.open("w") as out:
                process = subprocess.Popen(
                    command, env=os.environ, stdout=out, stderr=subprocess.STDOUT, text=True
                )
            started.append(Server(process, log))
            started[-1].wait_ready()
            return started[-1]

        try:
            yield serve
        finally:
            for server in started:
                if server.process.poll() is None:
                    server.process.kill()
                    server.process.wait()


@dataclass
class Answer:
    """What a client saw; times of `time.perf_counter`."""

    status: int = 0
    """0: no answer at all."""
    body: bytes = b""
    whole: bool = False
    """The end of the body came."""
    sent: float = 0.0
    first_byte: float = 0.0
    end: float = 0.0
    events: list[Any] = field(default_factory=list)
    """Of a stream, without the last, `[DONE]`."""

    @property
    def error_code(self) -> int:
        """Of an error that came in a stream, or as a status; 0 if none did."""
        told = [e["error"]["code"] for e in self.events if "error" in e]
        return told[0] if told else 0 if self.status == 200 else self.status

    @property
    def num_tokens(self) -> int:
        """Of the first choice, where token ids were asked for."""
        parts = self.events or [json.loads(self.body)]
        return sum(
            len(choice.get("token_ids") or ())
            for part in parts
            for choice in part.get("choices", ())[:1]
        )


def encode(body: dict[str, Any], path: str = COMPLETIONS) -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\nContent-Type:"
        " application/json\r\n"
    )
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


async def ask(
    port: int, body: dict[str, Any], *, begun: Callable[[], None] = lambda: None
) -> Answer:
    """Send a completion and read all that comes. `begun` is called with the first byte."""
    answer = Answer()
    try:
        reader, writer = await asyncio.open_connection(HOST, port)
    except OSError:
        return answer
    received = bytearray()
    try:
        answer.sent = time.perf_counter()
        writer.write(encode(body))
        while data := await reader.read(1 << 16):
            if not received:
                answer.first_byte = time.perf_counter()
                begun()
            received += data
    except OSError:
        pass
    finally:
        answer.end = time.perf_counter()
        writer.close()
    _parse(bytes(received), answer)
    return answer


def _parse(received: bytes, answer: Answer) -> None:
    head, found, body = received.partition(b"\r\n\r\n")
    if not found:
        return
    answer.status = int(head.split(b" ", 2)[1])
    if b"transfer-encoding: chunked" in head.lower():
        answer.whole = body.endswith(b"0\r\n\r\n")
        parts = []
        while body:
            size, _, rest = body.partition(b"\r\n")
            parts.append(rest[: int(size or b"0", 16)])
            body = rest[int(size or b"0", 16) + 2 :]
        body = b"".join(parts)
    else:
        length = re.search(rb"content-length: (\d+)", head.lower())
        answer.whole = length is not None and len(body) == int(length[1])
    answer.body = body
    if b"text/event-stream" in head:
        *lines, end = body.split(b"\n\n")  # what follows the last empty line is no whole event
        events = [line.removeprefix(b"data: ") for line in lines]
        answer.whole &= not end and events[-1:] == [b"[DONE]"]
        answer.events = [json.loads(e) for e in events if e != b"[DONE]"]
