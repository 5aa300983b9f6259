"""What tests of `AsyncEngine` share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from dovetail.errors import DovetailError
from dovetail.frontend.outputs import Delta
from dovetail.plugin.config import load_config
from dovetail.runtime.serving import AsyncEngine
from dovetail.types import SamplingParams
from dovetail_testing.plugin import SIMULATED

PATIENCE = 30
"""Seconds after which a test is a failure: a hang. Nothing here takes a tenth of it."""
LONG = SamplingParams(max_tokens=200, ignore_eos=True, seed=1)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, PATIENCE))


@asynccontextmanager
async def engine_of(model: Path, **values: Any) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(load_config(model=str(model), device="cpu", **{**SIMULATED, **values}))
    try:
        await engine.start()
        yield engine
    finally:
        await engine.close()


def faulty(**faults: Any) -> dict[str, Any]:
    return {"worker": {"use": "simulated", **faults}}


async def complete(engine: AsyncEngine, prompt: str, params: SamplingParams) -> list[Delta]:
    """All samples of a prompt, each as one delta."""
    samples = [Delta(i) for i in range(params.n)]
    async for delta in engine.generate(prompt, params):
        samples[delta.index].extend(delta)
    return samples


async def until(condition: Callable[[], bool]) -> None:
    """Wait for it; the test's own time limit is the bound."""
    while not condition():  # noqa: ASYNC110 - what is waited for has no event
        await asyncio.sleep(0.01)


async def outcome(work: Awaitable[Any]) -> Any:
    """What it returns, or the error it raises."""
    try:
        return await work
    except DovetailError as e:
        return e


def quiet(engine: AsyncEngine) -> Callable[[], bool]:
    """The engine holds nothing."""

    def check() -> bool:
        s = engine.stats
        return (
            engine.num_live
            == s.num_requests_running
            == s.num_requests_waiting
            == s.kv_blocks_used
            == 0
        )

    return check


def alive(pid: int) -> bool:
    """A zombie that its new parent has not buried yet is dead."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
