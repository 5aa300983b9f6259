"""How servers and their engines end under load: `kill -9` of the engine, and SIGTERM of the server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from typing import Any

from campaigns.base import Campaign, Report, Trial, is_process
from campaigns.served import Answer, Serve, Served, ask, servers

MAX_CLIENTS = 64
SLOW = {"worker": {"use": "simulated", "step_seconds": 0.01}, "scheduler": {"max_num_seqs": 32}}


def body_of(rng: random.Random, most: int) -> dict[str, Any]:
    """A request that takes some steps, and asks for its usage."""
    body: dict[str, Any] = {"prompt": "x" * rng.randint(1, 40), "n": rng.choice([1, 1, 1, 2]), "ignore_eos": True}
    body["max_tokens"] = rng.randint(1, most)
    return {**body, "stream": True, "stream_options": {"include_usage": True}} if rng.random() < 0.5 else body


def is_complete(answer: Answer, body: dict[str, Any]) -> bool:
    return answer.num_tokens() == body["n"] * body["max_tokens"]


def refused(answer: Answer) -> str:
    """The message of an answer that says 503 before or within its stream; empty for any other."""
    if not answer.is_whole:
        return ""
    if "text/event-stream" in answer.headers:
        events = answer.events()
        found = events[-2] if len(events) > 1 and events[-1] == "[DONE]" else {}
    else:
        found = json.loads(answer.body)
    error = found.get("error", {})
    return str(error.get("message", "")) if error.get("code") == 503 else ""


# kill -9 of the engine.


async def kill_once(served: Served, rng: random.Random, report: Report) -> None:
    [pid] = served.engine_pids()
    bodies = [body_of(rng, 200) for _ in range(rng.randint(1, MAX_CLIENTS))]
    tasks = [asyncio.create_task(ask(served.port, b)) for b in bodies]
    await asyncio.sleep(rng.uniform(0.02, 0.6))
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    answers = await asyncio.gather(*tasks)
    told = []
    for answer, body in zip(answers, bodies, strict=True):
        if is_complete(answer, body):
            report.counts["clients that had their answer"] += 1
            continue
        message = refused(answer)
        assert message, f"a client was not told: {answer.error or answer.status} {answer.body[-300:]!r}"
        assert "signal 9" in message or "restarting" in message, message
        told.append(answer.ended)
    report.counts["clients told"] += len(told)
    if told:
        report.took("kill to last client told", max(told) - killed)


async def serves_again(served: Served, old: int) -> None:
    """A new process answers, and nothing of the old one's requests is left."""
    limit = time.monotonic() + 30
    while (answer := await ask(served.port, {"prompt": "a", "max_tokens": 2, "ignore_eos": True})).status != 200:
        assert answer.status == 503, f"{answer.error or answer.status} while it restarts"
        assert time.monotonic() < limit, f"it does not come back: {served.output()[-2000:]}"
        await asyncio.sleep(0.05)
    assert answer.num_tokens() == 2
    assert served.engine_pids() != [old]
    assert not is_process(old), "the old process is still there"


@contextlib.contextmanager
def killing(report: Report) -> Iterator[Trial]:
    """A trial is one kill, of the engine of one server for all."""
    with servers() as serve, asyncio.Runner() as runner:
        served = serve(**SLOW)

        def trial(seed: int) -> None:
            [pid] = served.engine_pids()
            runner.run(kill_once(served, random.Random(seed), report))
            runner.run(serves_again(served, pid))
            served.until(served.is_quiet, "nothing is left of what was killed")

        yield trial
        served.check_log()


# SIGTERM of the server.


async def drain_once(serve: Serve, rng: random.Random, report: Report) -> None:
    served = await asyncio.to_thread(serve, **SLOW, max_num_waiting=4 * MAX_CLIENTS)
    bodies = [body_of(rng, 100) for _ in range(rng.randint(1, MAX_CLIENTS))]
    late = [body_of(rng, 100) for _ in range(rng.randint(0, 8))]
    tasks = [asyncio.create_task(ask(served.port, b)) for b in bodies]
    await asyncio.sleep(rng.uniform(0.0, 0.5))
    stopped = time.monotonic()
    served.process.send_signal(signal.SIGTERM)
    for body in late:
        await asyncio.sleep(rng.uniform(0.0, 0.05))
        tasks.append(asyncio.create_task(ask(served.port, body)))
    answers = await asyncio.gather(*tasks)
    status = await asyncio.to_thread(served.process.wait, 30)
    for answer, body in zip(answers, bodies + late, strict=True):
        if is_complete(answer, body):
            report.counts["answered in full"] += 1
            continue
        assert answer.error != "hung", "a client was never answered"
        # What came too late to be admitted is refused, or finds nobody who listens.
        assert answer.status in (0, 503), f"cut after {answer.status}: {answer.body[-300:]!r}"
        if answer.status == 503:
            assert "draining" in refused(answer), f"{answer.body!r}"
        report.counts["refused" if answer.status else "found nobody"] += 1
        seconds = stopped - answer.sent
        assert seconds < 0.25, f"sent {seconds:.2f} s before the signal, and answered {answer.status} {answer.error}"
    assert status == 0, f"exit status {status}: {served.output()[-2000:]}"
    served.check_log()
    report.took("SIGTERM to exit", time.monotonic() - stopped)


@contextlib.contextmanager
def draining(report: Report) -> Iterator[Trial]:
    """A trial is one server and its end."""
    with servers() as serve:
        yield lambda seed: asyncio.run(drain_once(serve, random.Random(seed), report))


KILLS = Campaign(
    "kills", "kill -9 of the engine under load: every client told, none hung, a new process serves", killing, full=200, slice=2
)  # fmt: skip
DRAINS = Campaign(
    "drains", "SIGTERM with many clients in flight: what was admitted is answered in full", draining, full=100, slice=1,
    parallel=2,
)  # fmt: skip
