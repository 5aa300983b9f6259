"""Ten times more requests than a server can finish: what it finishes, how fast it refuses, and what memory it takes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from campaigns.base import Campaign, Report, Trial
from campaigns.served import COMPLETIONS, Answer, Served, ask, servers

SEATS, WAITING = 8, 16
SETTINGS: dict[str, Any] = {
    "worker": {"use": "simulated", "step_seconds": 0.02}, "scheduler": {"max_num_seqs": SEATS}, "max_num_waiting": WAITING,
}  # fmt: skip
BODY = {"prompt": "a question", "max_tokens": 20, "ignore_eos": True}
CONCURRENCY = (SEATS, SEATS + WAITING // 2, SEATS + WAITING)
FACTOR = 10
MIN_GOODPUT = 0.95
"""Of the best without overload."""
MAX_GROWTH = 1.05
"""Of resident memory, from the end of the first round to that of the last."""
ROUNDS = 3
"""Of measuring the best, and a third of a minute of overload."""
PROBES_PER_SECOND = 20


def goodput(answers: list[Answer], began: float, seconds: float) -> float:
    """Requests finished in full in a span of time, by the second."""
    ended = [a for a in answers if a.num_tokens() == BODY["max_tokens"] and began <= a.ended < began + seconds]
    return len(ended) / seconds


async def at_concurrency(port: int, concurrency: int, seconds: float) -> float:
    """So many clients, each of which asks again when it has its answer; measured once they are at work."""
    began, answers = time.monotonic() + 1, list[Answer]()

    async def client() -> None:
        while time.monotonic() < began + seconds:
            answers.append(await ask(port, BODY))

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return goodput(answers, began, seconds)


async def at_rate(port: int, rate: float, seconds: float, rng: random.Random) -> tuple[list[Answer], float]:
    """Requests that arrive by chance, whatever becomes of those before. Returns all answers, and when it began to count."""
    tasks, due = list[asyncio.Task[Answer]](), time.monotonic()
    began = due + 1  # the queue is full by then
    while due < began + seconds:
        due += rng.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(ask(port, BODY)))
    return list(await asyncio.gather(*tasks)), began


class Probe(threading.Thread):
    """A client with a bare socket, in a thread of its own: from its whole head sent to the first byte of a refusal."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.port, self.refused, self.is_on, self.over = port, list[float](), threading.Event(), threading.Event()
        self.start()

    def stop(self) -> list[float]:
        """The seconds that refusals took."""
        self.over.set()
        self.join()
        return self.refused

    def run(self) -> None:
        body = json.dumps(BODY).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        while not self.over.wait(1 / PROBES_PER_SECOND):
            if not self.is_on.is_set():
                continue
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=10) as sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.sendall(f"{head}\r\n\r\n".encode())
                sent = time.perf_counter()
                sock.sendall(body)
                first = sock.recv(16)
                seconds = time.perf_counter() - sent
                if first.startswith(b"HTTP/1.1 429"):
                    self.refused.append(seconds)


def resident_mb(pids: list[int]) -> list[float]:
    def of(pid: int) -> float:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))

    return [of(pid) for pid in pids]


async def overload(served: Served, rng: random.Random, report: Report) -> None:
    rounds, seconds = (ROUNDS, 60 / ROUNDS) if report.at_length else (1, 1.0)
    level = CONCURRENCY[1]
    if report.at_length:
        found = {c: await at_concurrency(served.port, c, 5.0) for c in CONCURRENCY}
        level = max(CONCURRENCY, key=lambda c: found[c])
    pids, probe = [served.process.pid, *served.engine_pids()], Probe(served.port)
    best, offered, finished, resident = list[float](), list[float](), list[float](), list[list[float]]()
    # In turns, because what else the machine does changes with time.
    for _ in range(rounds):
        best.append(await at_concurrency(served.port, level, max(1.0, seconds / 2)))
        probe.is_on.set()
        answers, began = await at_rate(served.port, FACTOR * best[-1], seconds, rng)
        probe.is_on.clear()
        _check_answers(answers, report)
        offered.append(len(answers) / (seconds + 1))
        finished.append(goodput(answers, began, seconds))
        resident.append(resident_mb(pids))
    for took in probe.stop():
        report.took("refusal", took)
    share = sum(finished) / sum(best)
    report.figures |= {
        "best concurrency": level, "goodput at best concurrency, requests/s": sum(best) / rounds,
        "offered, requests/s": sum(offered) / rounds, "goodput under overload, requests/s": sum(finished) / rounds,
        "goodput under overload, of the best": share,
    }  # fmt: skip
    for i, name in enumerate(("server", "engine")):
        report.figures[f"resident memory of the {name} after the first round, MiB"] = resident[0][i]
        report.figures[f"resident memory of the {name} at the end, MiB"] = resident[-1][i]
    if report.at_length:  # less time says little
        assert share >= MIN_GOODPUT, f"{share:.3f} of the best goodput is left under overload: {finished} of {best}"
        grown = [b / a for a, b in zip(resident[0], resident[-1], strict=True)]
        assert max(grown) <= MAX_GROWTH, f"memory grows: {resident}"


def _check_answers(answers: list[Answer], report: Report) -> None:
    """In full, or refused with the time to come back."""
    for answer in answers:
        if answer.num_tokens() == BODY["max_tokens"]:
            report.counts["finished"] += 1
            continue
        assert answer.status == 429, f"{answer.status} {answer.error}: {answer.body[:300]!r}"
        assert "retry-after: " in answer.headers, answer.headers
        report.counts["refused"] += 1
    assert report.counts["refused"], "nobody was refused"


@contextlib.contextmanager
def opened(report: Report) -> Iterator[Trial]:
    """A trial is a server, its best, and its overload."""
    with servers() as serve:

        def trial(seed: int) -> None:
            served = serve(**SETTINGS)
            asyncio.run(overload(served, random.Random(seed), report))
            served.until(served.is_quiet, "nothing is left of the requests")
            served.check_log()
            assert served.stop() == 0

        yield trial


OVERLOAD = Campaign(
    "overload", "ten times more requests than can be finished, for a minute: goodput, refusals, memory", opened, full=1, slice=1
)  # fmt: skip
