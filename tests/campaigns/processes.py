"""Engine processes whose plugins hang, and clients that use an id again at once: nobody waits,
nobody gets another's answer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from async_engine import LONG, engine_of, until
from chaos import is_first

from campaigns.base import Campaign, Report, Trial, plugins
from dovetail import LLM, SamplingParams
from dovetail.errors import DovetailError, EngineDead, InvalidRequest
from dovetail.runtime.serving import CLOSE_PATIENCE, AsyncEngine
from dovetail_testing.plugin import SIMULATED, make_model

PATIENCE = 60
"""Seconds after which somebody waits for ever."""
STALL_TIMEOUT = 1.0
LOAD_TIMEOUT = 3.0
GRACE = 4.0
"""Seconds beyond the time-out within which a hang is noticed and all are told, on a machine that
does other work as well."""
METHODS = {
    # By phase, who hangs in which method.
    "build": (
        [
            (extension_point, "build")
            for extension_point in (
                "worker",
                "scheduler",
                "kv_cache",
                "prefix_cache",
                "speculation",
            )
        ]
        + [("worker", "load"), ("worker", "allocate"), ("worker", "warm_up")]
    ),
    "add": [("scheduler", "add")],
    "step": [
        ("scheduler", "schedule"),
        ("worker", "submit"),
        ("worker", "sample"),
        ("kv_cache", "grow"),
        ("kv_cache", "reuse"),
        ("speculation", "propose"),
        ("prefix_cache", "match"),
    ],
    "abort": [("scheduler", "remove"), ("kv_cache", "free"), ("speculation", "forget")],
    "finish": [
        ("scheduler", "remove"),
        ("kv_cache", "free"),
        ("speculation", "forget"),
        ("prefix_cache", "insert"),
    ],
    "reset": [("kv_cache", "reset_prefix_cache"), ("prefix_cache", "reset"), ("eviction", "clear")],
    "caching": [
        ("prefix_cache", "keep"),
        ("prefix_cache", "claim"),
        ("prefix_cache", "evict"),
        ("prefix_cache", "forget"),
        ("eviction", "add"),
        ("eviction", "remove"),
        ("eviction", "pop"),
        ("kv_cache", "computed"),
        ("kv_cache", "trim"),
        ("kv_cache", "block_ids"),
    ],
    "close": [("worker", "close")],
}
AT_FIRST = ("build", "abort", "reset", "close")
"""Phases in which the first call hangs; in the others perhaps a later one."""
NUM_BLOCKS, BYTES_PER_BLOCK = 100, 4 * 128
"""So few that one sequence of full length takes most of them, and those of others are given up."""


async def tokens_of(
    engine: AsyncEngine, prompt: str, params: SamplingParams, **more: Any
) -> list[int]:
    found: list[int] = []
    async with aclosing(engine.generate(prompt, params, **more)) as deltas:
        async for delta in deltas:
            assert delta.finish_reason != "abort", f"{prompt!r} was aborted by somebody else"
            found += delta.token_ids
    return found


class Alone:
    """What prompts say alone."""

    def __init__(self, llm: LLM) -> None:
        self._llm, self._known = llm, dict[Any, list[int]]()

    def tokens(self, prompt: str, params: SamplingParams) -> list[int]:
        key = (prompt, params.seed, params.max_tokens)
        if key not in self._known:
            self._known[key] = self._llm.generate(prompt, params)[0].token_ids
        return self._known[key]


@contextlib.contextmanager
def simulated_model() -> Iterator[tuple[Path, Alone]]:
    with tempfile.TemporaryDirectory() as folder, plugins(Path(folder) / "site", "chaos"):
        model = make_model(Path(folder) / "model")
        with LLM(model, device="cpu", **SIMULATED) as llm:
            yield model, Alone(llm)


# Hangs.


@contextlib.contextmanager
def hangs_opened(report: Report) -> Iterator[Trial]:
    with simulated_model() as (model, alone):

        def trial(seed: int) -> None:
            rng = random.Random(seed)
            phase = list(METHODS)[seed % len(METHODS)]
            extension_point, method = rng.choice(METHODS[phase])
            with tempfile.TemporaryDirectory() as folder:
                marker = Path(folder) / "has-hung"
                at = 1 if phase in AT_FIRST else rng.randint(1, 3)
                values = _hanging(extension_point, method, at, marker)
                try:
                    asyncio.run(
                        asyncio.wait_for(
                            _hang(model, alone, phase, values, marker, rng, report), PATIENCE
                        )
                    )
                except TimeoutError:
                    raise AssertionError(
                        f"{phase}: {extension_point}.{method} hangs, and somebody waits for ever"
                    ) from None
                except AssertionError as e:
                    raise AssertionError(f"{phase}: {extension_point}.{method} hangs: {e}") from e
                assert marker.exists(), f"{phase}: {extension_point}.{method} was never called"
            report.counts[f"hangs in {phase}"] += 1

        yield trial


def _hanging(extension_point: str, method: str, at: int, marker: Path) -> dict[str, Any]:
    chaos: dict[str, Any] = {
        "use": "chaos",
        "fault": "hang",
        "at": at,
        "method": method,
        "once": str(marker),
    }
    if extension_point == "speculation":
        chaos |= {"adaptive": False}
    values: dict[str, Any] = {
        "stall_timeout": STALL_TIMEOUT,
        "load_timeout": LOAD_TIMEOUT,
        "scheduler": {"max_num_seqs": 2},
    }
    values |= {
        "kv_cache": {"block_size": 4, "memory_gb": NUM_BLOCKS * BYTES_PER_BLOCK / 2**30},
        "prefix_cache": "hash",
    }
    if extension_point == "eviction":
        return values | {"prefix_cache": {"use": "hash", "eviction": chaos}}
    return values | {
        extension_point: {
            **(values.get(extension_point) if extension_point in ("scheduler", "kv_cache") else {}),
            **chaos,
        }
    }


async def _hang(
    model: Path,
    alone: Alone,
    phase: str,
    values: dict[str, Any],
    marker: Path,
    rng: random.Random,
    report: Report,
) -> None:
    if phase == "build" and rng.random() < 0.5:  # at the first start, which then fails
        began = time.monotonic()
        with pytest.raises(DovetailError, match="load_timeout"):
            async with engine_of(model, **values):
                pass
        report.took("hang at the start noticed", time.monotonic() - began)
        assert time.monotonic() - began < LOAD_TIMEOUT + GRACE, (
            f"noticed after {time.monotonic() - began:.1f} s"
        )
        return
    if phase == "close":
        async with engine_of(model, **values) as engine:
            await tokens_of(engine, "x", LONG)
            began = time.monotonic()
        report.took("close although the worker hangs in it", time.monotonic() - began)
        assert time.monotonic() - began < CLOSE_PATIENCE + GRACE, (
            f"closed after {time.monotonic() - began:.1f} s"
        )
        return
    if phase == "build":
        is_first(str(marker))
    async with engine_of(model, **values) as engine:
        prompts = [rng.choice("abc") * rng.randint(1, 9) for _ in range(3)]
        clients = [asyncio.create_task(tokens_of(engine, p, LONG)) for p in prompts]
        if phase == "build":  # of the second process
            os.unlink(marker)
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
        elif phase == "abort":
            await until(lambda: engine.stats.num_requests_running)
            clients.pop().cancel()
        elif phase == "reset":
            engine.reset_prefix_cache()
        elif phase == "finish":
            clients.append(
                asyncio.create_task(
                    tokens_of(engine, "x", SamplingParams(max_tokens=2, ignore_eos=True, seed=1))
                )
            )
        elif phase == "caching":
            clients.append(asyncio.create_task(_traffic(engine, rng)))
        await until(marker.exists)
        began = time.monotonic()
        outcomes = await asyncio.gather(*clients, return_exceptions=True)
        seconds = time.monotonic() - began
        if phase != "build":
            report.took("clients told of a hang", seconds)
            assert seconds < STALL_TIMEOUT + GRACE, f"clients were told after {seconds:.1f} s"
        for prompt, outcome in zip(prompts, outcomes, strict=False):
            assert isinstance(outcome, EngineDead) or outcome == alone.tokens(prompt, LONG), (
                f"a client got {outcome!r}"
            )
        await until(lambda: engine.state == "ready")
        assert engine.num_restarts == (2 if phase == "build" else 1), (
            f"{engine.num_restarts} restarts"
        )
        assert await tokens_of(engine, "after", LONG) == alone.tokens("after", LONG), (
            "the new engine says something else"
        )


async def _traffic(engine: AsyncEngine, rng: random.Random) -> None:
    """Prompts that begin alike, one after another until the engine dies."""
    while True:
        prompt = "the same beginning"[: rng.randint(1, 18)] + rng.choice("abc") * rng.randint(1, 30)
        await tokens_of(
            engine, prompt, SamplingParams(max_tokens=rng.randint(1, 20), ignore_eos=True, seed=1)
        )


HANGS = Campaign(
    "hangs",
    "a plugin that hangs in any hook: noticed within the time-out, clients told, the engine"
    " replaced",
    hangs_opened,
    full=200,
    slice=2,
)


# Ids that are used again.


@contextlib.contextmanager
def ids_opened(report: Report) -> Iterator[Trial]:
    with (
        simulated_model() as (model, alone),
        asyncio.Runner() as runner,
        contextlib.ExitStack() as stack,
    ):
        context = engine_of(
            model, scheduler={"max_num_seqs": 3}, prefix_cache="hash", kv_cache={"block_size": 4}
        )
        engine = runner.run(context.__aenter__())
        stack.callback(lambda: runner.run(context.__aexit__(None, None, None)))

        def trial(seed: int) -> None:
            runner.run(
                asyncio.wait_for(_reuse_ids(engine, alone, random.Random(seed), report), PATIENCE)
            )

        yield trial


async def _reuse_ids(engine: AsyncEngine, alone: Alone, rng: random.Random, report: Report) -> None:
    """Clients share three ids, and leave at any moment; who stays must get all of its own
    answer."""
    plans = [[_Turn(rng) for _ in range(rng.randint(1, 8))] for _ in range(3)]
    await asyncio.gather(
        *(
            _take_turns(engine, alone, n, turns, report)
            for n, turns in zip("abc", plans, strict=True)
        )
    )
    await until(
        lambda: (
            engine.num_live == 0
            and engine.stats.num_requests_running == engine.stats.kv_blocks_used == 0
        )
    )


class _Turn:
    def __init__(self, rng: random.Random) -> None:
        self.prompt = rng.choice("abc") * rng.randint(1, 12) + rng.choice("xyz")
        self.params = SamplingParams(
            max_tokens=rng.randint(1, 20), ignore_eos=True, seed=rng.randrange(5)
        )
        self.how = rng.choice(["stays", "stays", "cancelled", "closed", "dropped"])
        self.num_deltas = rng.randint(0, 6)
        self.naps = rng.choice([0, 0, 0, 1, 3])


async def _take_turns(
    engine: AsyncEngine, alone: Alone, name: str, turns: list[_Turn], report: Report
) -> None:
    for turn in turns:
        if turn.how == "stays":
            found = await tokens_of(engine, turn.prompt, turn.params, request_id=name)
        else:
            found = await _leave(engine, turn, name)
        expected = alone.tokens(turn.prompt, turn.params)
        assert found == expected[: len(found)], (
            f"request {name!r} got {found}, and alone {expected}"
        )
        assert turn.how != "stays" or found == expected, (
            f"request {name!r} got only {found} of {expected}"
        )
        report.counts[f"clients that {'stayed' if turn.how == 'stays' else 'left'}"] += 1
        for _ in range(turn.naps):
            await asyncio.sleep(0)
        if (
            turn.how == "dropped"
        ):  # asyncio closes it in its own time, and the id is in use until then
            await until(lambda: name not in engine._request_ids)


async def _leave(engine: AsyncEngine, turn: _Turn, name: str) -> list[int]:
    """Be gone after some deltas: by cancelling, by closing the iterator, or by forgetting it."""
    found: list[int] = []

    async def read() -> None:
        deltas = engine.generate(turn.prompt, turn.params, request_id=name)
        count = 0
        while count < turn.num_deltas and (delta := await anext(deltas, None)) is not None:
            found.extend(delta.token_ids)
            count += 1
        if turn.how == "closed":
            await deltas.aclose()
        elif turn.how == "cancelled":
            await anext(deltas, None)

    task = asyncio.create_task(read())
    if turn.how == "cancelled":
        for _ in range(turn.num_deltas):
            await asyncio.sleep(0)
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError, InvalidRequest):
        await task
    return found


IDS = Campaign(
    "reused-ids",
    "ids that are used again right after their client has left: nobody gets another's answer"
    " or end",
    ids_opened,
    full=2_000,
    slice=20,
)
