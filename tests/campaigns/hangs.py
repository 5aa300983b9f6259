"""A plugin that hangs, in any hook and phase, inside an engine process: noticed within the limit, everybody told, replaced."""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from campaigns.base import Campaign, Report, Trial, is_process, plugins
from dovetail.config import load_config
from dovetail.errors import DovetailError, EngineDead, EngineUnavailable
from dovetail.llm import LLM
from dovetail.serving import CLOSE_PATIENCE, AsyncEngine
from dovetail.testing.plugin import SIMULATED, make_model
from dovetail.types import SamplingParams

PHASES = {
    "scheduler": ("build", "add", "schedule", "remove"),
    "kv_cache": ("build", "grow", "block_ids", "computed", "trim", "free", "reset_prefix_cache"),
    "worker": ("build", "load", "kv_memory", "allocate", "warm_up", "submit", "sample", "close"),
    "speculation": ("build", "propose", "forget"),
    "prefix_cache": ("build", "match", "insert", "keep", "claim", "evict", "forget", "reset"),
    "eviction": ("build", "add", "remove", "pop", "clear"),
}
STARTING = ("build", "load", "kv_memory", "allocate", "warm_up")
CULPRIT = "dovetail-chaos:chaos"
TIMEOUT = 1.0
"""Of a step: the least that can be configured."""
LOAD_TIMEOUT = 2.0
"""Of what hangs in it; others are given more, for a busy machine."""
SLACK = 4.0
"""Until a heartbeat tells, the stacks are written, and a busy machine comes to it."""
PATIENCE = 30.0
PROBE = SamplingParams(max_tokens=20, seed=5, ignore_eos=True)


def settings_of(rng: random.Random, part: str, phase: str, mark: Path) -> dict[str, Any]:
    """Of an engine with the chaos plugin in a part, and few blocks, so that every phase comes."""
    at = 1 if phase in (*STARTING, "close", "reset", "reset_prefix_cache", "clear") else rng.randint(1, 5)
    chaos: dict[str, Any] = {"use": "chaos", "fault": "hang", "method": phase, "at": at, "mark": str(mark)}
    settings: dict[str, Any] = {
        **SIMULATED, "overlap": rng.random() < 0.5, "stall_timeout": TIMEOUT, "max_model_len": 60,
        "load_timeout": LOAD_TIMEOUT if phase in STARTING else PATIENCE,
        "scheduler": {"max_num_seqs": 4}, "kv_cache": {"block_size": 4}, "prefix_cache": "none",
    }  # fmt: skip
    if part == "speculation":
        chaos["adaptive"] = False
    if part in ("prefix_cache", "eviction"):
        settings["kv_cache"]["memory_gb"] = 40 * 4 * 128 / 2**30
    if part == "eviction":
        settings["prefix_cache"] = {"use": "hash", "eviction": chaos}
        return settings
    given = settings.get(part)
    settings[part] = {**(given if isinstance(given, dict) else {}), **chaos}
    return settings


class Clients:
    """They ask without end until the engine fails them, and note when it did."""

    def __init__(self, engine: AsyncEngine, rng: random.Random) -> None:
        self.engine, self.rng = engine, rng
        self.told: list[float] = []
        self.errors: list[DovetailError] = []

    async def run(self) -> None:
        try:
            while True:
                await self._ask()
                if self.rng.random() < 0.2:
                    self.engine.reset_prefix_cache()
        except DovetailError as e:
            self.told.append(time.monotonic())
            self.errors.append(e)

    async def _ask(self) -> None:
        prompt = "the same beginning"[: self.rng.randint(1, 18)] + self.rng.choice("abc") * self.rng.randint(0, 20)
        params = SamplingParams(
            n=self.rng.choice([1, 1, 2]), max_tokens=self.rng.randint(1, 20), seed=self.rng.randrange(99), ignore_eos=True
        )
        num_wanted = self.rng.choice([1, 3, 100, 100])  # few: it leaves, and the request is aborted
        async with aclosing(self.engine.generate(prompt, params)) as deltas:
            async for _ in deltas:
                num_wanted -= 1
                if num_wanted == 0:
                    return


def hung_at(mark: Path) -> float:
    """When the plugin came to its hang; 0 before."""
    return float((mark.read_text() if mark.exists() else "") or 0)


async def _until(condition: Any, what: str) -> None:
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit, f"waited {PATIENCE:.0f} s in vain: {what}"
        await asyncio.sleep(0.01)


async def hang_once(seed: int, folder: Path, model: Path, expected: list[int], report: Report) -> None:
    rng = random.Random(seed)
    part = rng.choice(sorted(PHASES))
    phase = rng.choice(PHASES[part])
    mark = folder / f"mark-{seed}"
    mark.unlink(missing_ok=True)
    config = load_config(model=str(model), device="cpu", env={}, **settings_of(rng, part, phase, mark))
    engine = AsyncEngine(config)
    where = f"{part}.{phase}"
    report.counts[where] += 1
    try:
        if phase in STARTING:
            await _starting(engine, where, mark, report)
            return
        await engine.start()
        if phase == "close":
            await _closing(engine, where, report)
            return
        clients = Clients(engine, rng)
        tasks = [asyncio.create_task(clients.run()) for _ in range(rng.randint(1, 6))]
        await _until(lambda: hung_at(mark) > 0, f"{where} was never called")
        done, pending = await asyncio.wait(tasks, timeout=PATIENCE)
        for task in done:
            task.result()
        assert not pending, f"{len(pending)} clients were never told of a hang in {where}"
        _check_told(clients, where, hung_at(mark), report)
        await _until(lambda: engine.state == "ready", f"a new process after a hang in {where}")
        assert engine.num_restarts == 1, f"{engine.num_restarts} restarts for one hang in {where}"
        tokens: list[int] = []
        async with aclosing(engine.generate("probe", PROBE)) as deltas:
            async for delta in deltas:
                tokens += delta.token_ids
        assert tokens == expected, f"after a hang in {where}: {tokens}, not {expected}"
    finally:
        await engine.close()
    assert engine.pid is not None
    assert not is_process(engine.pid), f"the process outlives its engine after a hang in {where}"


def _check_told(clients: Clients, where: str, hung: float, report: Report) -> None:
    seconds = max(clients.told) - hung
    report.took("hang to last client told", seconds)
    report.counts["clients told"] += len(clients.told)
    assert seconds < TIMEOUT + SLACK, f"a hang in {where} was noticed after {seconds:.2f} s"
    dead = [e for e in clients.errors if isinstance(e, EngineDead)]
    assert dead, f"nobody was told of the hang in {where}: {clients.errors}"
    assert all(isinstance(e, EngineDead | EngineUnavailable) for e in clients.errors), f"{where}: {clients.errors}"
    assert "has not ended" in dead[0].message, f"{where}: {dead[0].message}"
    assert CULPRIT in dead[0].message, f"the hang in {where} names nobody: {dead[0].message}"


async def _starting(engine: AsyncEngine, where: str, mark: Path, report: Report) -> None:
    message = "no error"
    try:
        await asyncio.wait_for(engine.start(), PATIENCE)
    except EngineDead as e:
        message = e.message
    assert "loading made no progress" in message, f"{where}: {message}"
    seconds = time.monotonic() - hung_at(mark)
    report.took("hang while starting to error", seconds)
    assert seconds < LOAD_TIMEOUT + SLACK, f"a hang in {where} was noticed after {seconds:.2f} s"


async def _closing(engine: AsyncEngine, where: str, report: Report) -> None:
    began = time.monotonic()
    await engine.close()
    seconds = time.monotonic() - began
    report.took("close of an engine that hangs in it", seconds)
    assert seconds < CLOSE_PATIENCE + SLACK, f"a hang in {where} took {seconds:.2f} s"


@contextlib.contextmanager
def opened(report: Report) -> Iterator[Trial]:
    """A trial is one engine and one hang."""
    with tempfile.TemporaryDirectory() as name, plugins(Path(name) / "site", "chaos"):
        folder = Path(name)
        model = make_model(folder / "model")
        with LLM(model, device="cpu", max_model_len=60, **SIMULATED) as llm:
            [expected] = llm.generate(["probe"], PROBE)
        yield lambda seed: asyncio.run(hang_once(seed, folder, model, expected.token_ids, report))


HANGS = Campaign(
    "hangs", "a plugin that hangs in any hook and phase: noticed in time, clients told, the engine replaced", opened,
    full=200, slice=1, parallel=6,
)  # fmt: skip
