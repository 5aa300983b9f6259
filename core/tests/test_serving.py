"""`AsyncEngine` with real engine processes: the same answers as in one process, and an end that
loses nothing."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import time
from contextlib import aclosing
from pathlib import Path

import pytest
from async_engine import (
    LONG,
    PATIENCE,
    alive,
    complete,
    engine_of,
    faulty,
    outcome,
    quiet,
    run,
    until,
)

from dovetail.errors import DovetailError, EngineDead, EngineUnavailable, InvalidRequest, Overloaded
from dovetail.frontend.outputs import Delta
from dovetail.plugin.config import load_config
from dovetail.runtime.llm import LLM
from dovetail.runtime.serving import AsyncEngine
from dovetail.types import SamplingParams
from dovetail_testing.plugin import SIMULATED, make_model

pytestmark = pytest.mark.usefixtures("simulated")


# The same answers.


@pytest.mark.parametrize("overlap", [False, True])
def test_many_at_once_answer_as_in_one_process(model: Path, overlap: bool) -> None:
    texts = [f"prompt number {i}" * (1 + i % 3) for i in range(24)]
    params = [
        SamplingParams(max_tokens=20 + i, seed=i, n=1 + i % 3, logprobs=2 if i % 5 == 0 else None)
        for i in range(24)
    ]
    with LLM(str(model), device="cpu", **SIMULATED) as llm:
        expected = llm.generate(texts, params)

    async def test() -> None:
        async with engine_of(model, overlap=overlap) as engine:
            answers = await asyncio.gather(
                *(complete(engine, t, p) for t, p in zip(texts, params, strict=True))
            )
            for answer, want in zip(answers, expected, strict=True):
                for delta, sample in zip(answer, want.outputs, strict=True):
                    assert (delta.token_ids, delta.text) == (sample.token_ids, sample.text)
                    assert (delta.finish_reason, delta.stop_reason) == (
                        sample.finish_reason,
                        sample.stop_reason,
                    )
                    given = [
                        dict(zip(p.token_ids, p.logprobs, strict=True)) for p in delta.logprobs
                    ]
                    assert given == (sample.logprobs or [])
            await until(quiet(engine))
            assert engine.stats.num_prompt_tokens > 0

    run(test())


def test_a_stop_string_ends_the_sequence_in_the_engine(model: Path) -> None:
    async def test() -> None:
        async with engine_of(model, **faulty(step_seconds=0.005)) as engine:
            [whole] = await complete(engine, "go on", LONG)
            assert len(whole.token_ids) == 200
            stop = whole.text[10:13]
            before = engine.stats.num_generation_tokens
            [cut] = await complete(
                engine,
                "go on",
                SamplingParams(max_tokens=200, ignore_eos=True, seed=1, stop=(stop,)),
            )
            assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.find(stop)], "stop")
            assert cut.stop_reason == stop
            assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
            await until(quiet(engine))
            assert engine.stats.num_generation_tokens - before < 100

    run(test())


def test_leaving_early_frees_everything(model: Path) -> None:
    async def test() -> None:
        async with engine_of(model, **faulty(step_seconds=0.02)) as engine:
            async with aclosing(engine.generate("a", LONG)) as deltas:
                assert (await anext(deltas)).token_ids
                assert engine.stats.num_requests_running == 1
                assert engine.stats.kv_blocks_used > 0
            assert engine.num_live == 0
            await until(quiet(engine))
            waiter = asyncio.create_task(complete(engine, "b", LONG))
            await until(lambda: engine.stats.num_requests_running == 1)
            waiter.cancel()
            await until(quiet(engine))
            assert engine.stats.num_generation_tokens < 100

    run(test())


def test_a_slow_reader_gets_merged_news(model: Path) -> None:
    async def test() -> None:
        async with engine_of(model) as engine:
            [whole] = await complete(engine, "a", LONG)
            deltas = engine.generate("a", LONG)
            first = await anext(deltas)
            await until(
                lambda: engine.stats.num_requests_running == 0
            )  # all of it has arrived, and nobody has looked
            rest = [d async for d in deltas]
            assert len(rest) == 1
            assert first.token_ids + rest[0].token_ids == whole.token_ids
            assert first.text + rest[0].text == whole.text
            assert rest[0].finish_reason == "length"

    run(test())


# What is refused.


def test_bad_requests_are_refused_before_the_engine_sees_them(model: Path) -> None:
    async def test() -> None:
        async with engine_of(model, max_num_waiting=4) as engine:
            for prompt, params in (
                ("", SamplingParams()),
                ([1, 10_000], SamplingParams()),
                ("x" * 300, SamplingParams()),
                ("x", SamplingParams(n=5)),
                ("x", SamplingParams(stop_token_ids=(2**70,))),
            ):
                with pytest.raises(InvalidRequest):
                    await anext(engine.generate(prompt, params))
            with pytest.raises(InvalidRequest, match="priority"):
                await anext(engine.generate("x", SamplingParams(), priority=2**70))
            first = engine.generate("a", LONG, request_id="same")
            await anext(first)
            with pytest.raises(InvalidRequest, match="already in use"):
                await anext(engine.generate("b", LONG, request_id="same"))
            await first.aclose()
            assert engine.num_live == 0

    run(test())


def test_overload_is_refused_and_loses_nothing(model: Path) -> None:
    limits = {"max_num_waiting": 4, "scheduler": {"max_num_seqs": 2}}

    async def test() -> None:
        async with engine_of(model, **limits, **faulty(step_seconds=0.002)) as engine:
            params = SamplingParams(max_tokens=20, ignore_eos=True)
            results = await asyncio.gather(
                *(outcome(complete(engine, f"{i}", params)) for i in range(40))
            )
            refused = [r for r in results if isinstance(r, Overloaded)]
            done = [r[0] for r in results if not isinstance(r, DovetailError)]
            assert len(refused) + len(done) == 40
            assert refused
            assert len(done) >= 4
            assert all(len(d.token_ids) == 20 for d in done)
            await until(quiet(engine))
            assert (await complete(engine, "again", params))[0].finish_reason == "length"

    run(test())


# How it ends.


def test_draining_finishes_what_runs_and_takes_nothing_new(model: Path) -> None:
    async def test() -> None:
        async with engine_of(model, **faulty(step_seconds=0.005)) as engine:
            running = asyncio.create_task(complete(engine, "x", LONG))
            await until(lambda: engine.num_live == 1)
            assert not await engine.drain(0)
            draining = asyncio.create_task(engine.drain(PATIENCE))
            await asyncio.sleep(0)
            with pytest.raises(EngineUnavailable, match="draining"):
                await anext(engine.generate("y", LONG))
            assert await draining
            [whole] = await running
            assert len(whole.token_ids) == 200

    run(test())


def test_an_engine_that_dies_while_draining_is_not_replaced(model: Path) -> None:
    async def test() -> None:
        async with engine_of(model, **faulty(exit_at=20, step_seconds=0.005)) as engine:
            running = asyncio.create_task(outcome(complete(engine, "x", LONG)))
            await until(lambda: engine.num_live == 1)
            assert await engine.drain(PATIENCE)
            assert isinstance(await running, EngineDead)
            assert (engine.state, engine.num_restarts) == ("draining", 0)

    run(test())


def test_closing_fails_the_rest_and_may_be_repeated(model: Path) -> None:
    async def test() -> None:
        async with engine_of(model, **faulty(step_seconds=0.02)) as engine:
            pid = engine.pid
            assert pid is not None
            waiter = asyncio.create_task(outcome(complete(engine, "x", LONG)))
            await until(lambda: engine.stats.num_requests_running == 1)
            await asyncio.gather(engine.close(), engine.close())
            assert isinstance(await waiter, EngineUnavailable)
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
            with pytest.raises(EngineUnavailable, match="closed"):
                await anext(engine.generate("x", LONG))

    run(test())


def test_closing_while_loading_ends_the_wait_for_the_start(model: Path) -> None:
    async def test() -> None:
        engine = AsyncEngine(load_config(model=str(model), device="cpu", **SIMULATED))
        starting = asyncio.create_task(outcome(engine.start()))
        await until(lambda: engine.pid is not None)
        await engine.close()
        assert isinstance(await starting, EngineUnavailable)

    run(test())


FRONT_END = """
import asyncio, sys
from dovetail.plugin.config import load_config
from dovetail.runtime.serving import AsyncEngine
from dovetail.types import SamplingParams

async def main():
    engine = AsyncEngine(load_config(model=sys.argv[1], device="cpu", attention="simulated",
                                     worker={"use": "simulated", "hang_at": int(sys.argv[2])}))
    await engine.start()
    print(engine.pid, flush=True)
    async for _ in engine.generate("x", SamplingParams(max_tokens=200, ignore_eos=True)):
        print("token", flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("hang_at", [3, 10_000])
def test_the_engine_does_not_outlive_its_front_end(model: Path, hang_at: int) -> None:
    """Not even in the middle of a step."""
    command = [sys.executable, "-c", textwrap.dedent(FRONT_END), str(model), str(hang_at)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as front_end:
        assert front_end.stdout is not None
        try:
            pid = int(front_end.stdout.readline())
            assert front_end.stdout.readline() == "token\n"
        finally:
            front_end.kill()
    limit = time.monotonic() + PATIENCE
    while alive(pid):
        assert time.monotonic() < limit, "the engine process is still there"
        time.sleep(0.02)


def test_two_engines_live_side_by_side(model: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", max_len=64)

    async def test() -> None:
        async with engine_of(model) as one, engine_of(other) as two:
            params = SamplingParams(max_tokens=5, seed=3, ignore_eos=True)
            a, b = await asyncio.gather(complete(one, "x", params), complete(two, "x", params))
            assert [(d.token_ids, d.text, d.finish_reason) for d in a] == [
                (d.token_ids, d.text, d.finish_reason) for d in b
            ]
            assert one.pid != two.pid
            assert (one.plan.max_model_len, two.plan.max_model_len) == (256, 64)

    run(test())


# What used to go wrong between processes.


def test_an_id_that_is_used_again_gets_nothing_of_its_former_request(model: Path) -> None:
    async def test() -> None:
        async with engine_of(model, overlap=True, **faulty(step_seconds=0.01)) as engine:
            params = SamplingParams(max_tokens=8, ignore_eos=True, seed=1)
            expected = await complete(engine, "a", params)
            for _ in range(10):
                async with aclosing(engine.generate("b", LONG, request_id="mine")) as deltas:
                    await anext(deltas)
                again = Delta(0)
                async for delta in engine.generate("a", params, request_id="mine"):
                    again.extend(delta)
                assert (again.token_ids, again.finish_reason) == (expected[0].token_ids, "length")
            await until(quiet(engine))

    run(test())


def test_two_requests_of_one_id_at_once_are_refused(model: Path) -> None:
    async def test() -> None:
        async with (
            engine_of(model, **faulty(step_seconds=0.01)) as engine,
            aclosing(engine.generate("b", LONG, request_id="mine")) as deltas,
        ):
            await anext(deltas)
            error = await outcome(anext(engine.generate("a", LONG, request_id="mine")))
            assert isinstance(error, InvalidRequest)

    run(test())


def test_a_reader_that_leaves_during_a_restart_does_not_cost_another_one(model: Path) -> None:
    async def test() -> None:
        async with engine_of(model, **faulty(step_seconds=0.01)) as engine:
            for _ in range(3):
                readers = [engine.generate("a", LONG) for _ in range(8)]
                for reader in readers:
                    await anext(reader)
                restarts = engine.num_restarts
                assert engine.pid is not None
                os.kill(engine.pid, 9)
                # They leave one by one, all the while that the next process is started.
                for reader in readers:
                    await reader.aclose()
                    await asyncio.sleep(0.05)
                await until(lambda: engine.state == "ready")
                assert engine.num_restarts <= restarts + 1

    run(test())


def test_files_of_the_working_directory_are_not_imported(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server may be started in a model's folder, and its code never runs."""
    for name in ("msgspec", "json", "dovetail_simulated", "torch"):
        (model / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.chdir(model)

    async def test() -> None:
        async with engine_of(model) as engine:
            await complete(engine, "a", SamplingParams(max_tokens=2))

    run(test())
    assert not (tmp_path / "ran").exists()
