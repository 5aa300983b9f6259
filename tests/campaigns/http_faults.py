"""`dovetail serve` with clients in flight: engines that are killed, SIGTERM, and ten times the load
that it can take."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from campaigns.base import Campaign, Report, Trial, quantile
from campaigns.load import Driven, Load, drive
from campaigns.served import HOST, PATIENCE, Answer, Server, ask, encode, servers

NUM_CLIENTS = 64
STEP_SECONDS = 0.02
TOLD_GOAL_MS = 250
REFUSED_GOAL_MS = 5
GOODPUT_GOAL = 0.95
GROWTH_GOAL_MIB = 16
REFUSAL = "from a request to the first byte of its refusal"
SLOW = {"worker": {"use": "simulated", "step_seconds": STEP_SECONDS}}


def body_of(rng: random.Random, num_tokens: int, *, stream: bool) -> dict[str, Any]:
    return {
        "prompt": rng.choice("abc") * rng.randint(1, 30),
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "seed": rng.randrange(9),
        "stream": stream,
        "return_token_ids": True,
    }


async def started(port: int, bodies: list[dict[str, Any]]) -> list[asyncio.Task[Answer]]:
    """Clients of which every stream has begun, and so, most likely, everybody is in flight."""
    num_begun, all_begun = 0, asyncio.Event()
    num_streams = sum(body["stream"] for body in bodies)

    def begun() -> None:
        nonlocal num_begun
        num_begun += 1
        if num_begun >= num_streams:
            all_begun.set()

    clients = [
        asyncio.create_task(ask(port, b, begun=begun if b["stream"] else lambda: None))
        for b in bodies
    ]
    await all_begun.wait()
    return clients


async def ready(port: int) -> None:
    """Until a request is answered: what is loading or restarting refuses."""
    body = {"prompt": "x", "max_tokens": 1, "ignore_eos": True}
    while (await ask(port, body)).status != 200:  # noqa: ASYNC110 - what is waited for has no event
        await asyncio.sleep(0.05)


def run(test: Any) -> None:
    try:
        asyncio.run(asyncio.wait_for(test, PATIENCE))
    except TimeoutError:
        raise AssertionError(f"somebody waits for ever, or longer than {PATIENCE} s") from None


# Engines that are killed.


@contextlib.contextmanager
def kills_opened(report: Report) -> Iterator[Trial]:
    with servers() as serve:
        server = serve(**SLOW)
        yield lambda seed: run(_kill(server, random.Random(seed), report))
        server.assert_no_traceback()
        assert server.stop() == 0, "the server did not end well"
        if told := report.times_ms.get("from the kill to the last client told"):
            report.goal(
                "from the kill to the last client told, p99 ms",
                quantile(told, 99),
                at_most=TOLD_GOAL_MS,
            )


async def _kill(server: Server, rng: random.Random, report: Report) -> None:
    await ready(server.port)
    bodies = [body_of(rng, 200, stream=rng.random() < 0.7) for _ in range(NUM_CLIENTS - 1)]
    clients = await started(server.port, [*bodies, body_of(rng, 200, stream=True)])
    await asyncio.sleep(rng.uniform(0, 0.5))
    killed = time.perf_counter()
    os.kill(server.engine_pid(), signal.SIGKILL)
    answers = await asyncio.gather(*clients)
    told = [a.end - killed for a in answers]
    for answer in answers:
        assert answer.error_code == 503, (
            f"a client was told {answer.error_code}: {answer.body[-200:]!r}"
        )
        assert answer.whole, f"a client's answer broke off: {answer.body[-200:]!r}"
        report.took("from the kill to each client told", answer.end - killed)
    report.took("from the kill to the last client told", max(told))
    report.counts["clients told"] += len(answers)
    await ready(server.port)
    report.took("from the kill to the next answer", time.perf_counter() - killed)


KILLS = Campaign(
    "kills",
    f"the engine killed under {NUM_CLIENTS} clients: all of them told, and a new one serves",
    kills_opened,
    full=200,
    slice=1,
)


# SIGTERM.


@contextlib.contextmanager
def drains_opened(report: Report) -> Iterator[Trial]:
    with servers() as serve:

        def trial(seed: int) -> None:
            server = serve(**SLOW)
            run(_drain(server, random.Random(seed), report))
            assert server.process.wait(PATIENCE) == 0, "the server did not end well"
            server.assert_no_traceback()
            assert "ERROR" not in server.output(), server.output()[-2000:]

        yield trial


async def _drain(server: Server, rng: random.Random, report: Report) -> None:
    lengths = [rng.randint(20, 120) for _ in range(NUM_CLIENTS)]
    bodies = [body_of(rng, n, stream=i == 0 or rng.random() < 0.6) for i, n in enumerate(lengths)]
    bodies[0]["max_tokens"] = 120  # somebody is in flight until the signal
    clients = await started(server.port, bodies)
    await asyncio.sleep(rng.uniform(0, 0.3))
    began = time.perf_counter()
    server.process.send_signal(signal.SIGTERM)
    late = [asyncio.create_task(ask(server.port, body_of(rng, 5, stream=False))) for _ in range(8)]
    for body, answer in zip(bodies, await asyncio.gather(*clients), strict=True):
        if not body["stream"] and answer.status == 503 and b"draining" in answer.body:
            report.counts["came too late to be admitted"] += (
                1  # of those without a stream nobody knows when they are
            )
            continue
        assert (answer.status, answer.whole, answer.error_code) == (
            200,
            True,
            0,
        ), f"cut off: {answer.body[-300:]!r}"
        assert answer.num_tokens == body["max_tokens"], (
            f"{answer.num_tokens} of {body['max_tokens']} tokens"
        )
        report.counts["admitted and answered in full"] += 1
    for answer in await asyncio.gather(*late):
        assert answer.status in (0, 200, 503), f"a late client was told {answer.status}"
        assert answer.status == 0 or answer.whole, (
            f"a late client's answer broke off: {answer.body!r}"
        )
        report.counts[f"late clients: {answer.status or 'no connection'}"] += 1
    report.took("from SIGTERM to the last answer", time.perf_counter() - began)


DRAINS = Campaign(
    "drains",
    f"SIGTERM with {NUM_CLIENTS} clients in flight: all that were admitted are answered in full",
    drains_opened,
    full=100,
    slice=1,
)


# Overload.


@contextlib.contextmanager
def overload_opened(report: Report) -> Iterator[Trial]:
    """A trial is a minute, or seconds in `make test`, of ten times the requests that the server can
    answer."""
    minute, each = (60.0, 12.0) if report.at_length else (2.0, 1.0)
    with servers() as serve:
        # The engine's pace is set by its steps, not by a machine that clients and server share.
        limits = {
            "scheduler": {"max_num_seqs": 8},
            "max_num_waiting": 8,
            "worker": {"use": "simulated", "step_seconds": 0.03},
        }
        server = serve(**limits)

        def trial(seed: int) -> None:
            peak = max(
                (drive(server.port, Load(each, seed, concurrency=c)) for c in (8, 16)),
                key=lambda d: d.goodput,
            )
            with ThreadPoolExecutor(1) as pool:
                driving = pool.submit(
                    drive, server.port, Load(minute, seed, rate=10 * peak.finished)
                )
                resident = _probe(server, minute, report)
                _conclude(peak, driving.result(), resident, report)

        yield trial
        server.assert_no_traceback()
        assert server.stop() == 0, "the server did not end well"


def _probe(server: Server, seconds: float, report: Report) -> list[float]:
    """One client that does nothing else: from the complete request to the first byte of its
    refusal. Returns the front-end's memory (MiB) meanwhile."""
    request = encode(
        {"prompt": "probe", "max_tokens": 1, "ignore_eos": True}
    )  # one that is admitted costs little
    limit, resident = time.monotonic() + seconds, list[float]()
    while time.monotonic() < limit:
        with socket.create_connection((HOST, server.port), timeout=PATIENCE) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            time.sleep(0.02)  # until it has been accepted
            began = time.perf_counter()
            sock.sendall(request)
            head = sock.recv(100)
            if head[9:12] in (b"429", b"503"):
                report.took(REFUSAL, time.perf_counter() - began)
        resident.append(server.resident_mib())
    return resident


def _conclude(peak: Driven, driven: Driven, resident: list[float], report: Report) -> None:
    report.counts.update(
        {f"answers {status or 'none'}": n for status, n in driven.statuses.items()}
    )
    assert set(driven.statuses) <= {200, 429, 503}, f"answers {driven.statuses}"
    assert {429, 503} & set(driven.statuses), "nobody was refused: that was no overload"
    report.figures |= {
        "peak requests/s": peak.finished,
        "peak tokens/s": peak.goodput,
        "offered requests/s": driven.offered,
        "finished requests/s": driven.finished,
        "finished tokens/s": driven.goodput,
    }
    report.goal(
        "goodput under overload / at its best", driven.goodput / peak.goodput, at_least=GOODPUT_GOAL
    )
    if refused := report.times_ms.get(REFUSAL):
        report.goal(
            "refusal, measured by a client, p99 ms", quantile(refused, 99), at_most=REFUSED_GOAL_MS
        )
    quarter = len(resident) // 4 + 1
    report.goal(
        "front-end's growth, MiB",
        max(resident[-quarter:]) - max(resident[:quarter]),
        at_most=GROWTH_GOAL_MIB,
    )


OVERLOAD = Campaign(
    "overload",
    "ten times the load for a minute: goodput, quick refusals, flat memory",
    overload_opened,
    full=1,
    slice=1,
)
