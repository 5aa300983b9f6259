"""`AsyncEngine` with real engine processes: the same answers as in one process, and nothing lost when things go wrong."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dovetail import wire
from dovetail.config import load_config
from dovetail.errors import (
    CheckpointError,
    DovetailError,
    EngineDead,
    EngineUnavailable,
    InvalidRequest,
    Overloaded,
    PluginError,
    StepFailed,
)
from dovetail.frontend.outputs import Delta
from dovetail.llm import LLM
from dovetail.plan import Plan
from dovetail.serving import AsyncEngine
from dovetail.testing.plugin import SIMULATED, install, make_model
from dovetail.types import SamplingParams

pytestmark = pytest.mark.usefixtures("simulated")
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
        return engine.num_live == s.num_requests_running == s.num_requests_waiting == s.kv_blocks_used == 0

    return check


# The same answers.


@pytest.mark.parametrize("overlap", [False, True])
def test_many_at_once_answer_as_in_one_process(model: Path, overlap: bool) -> None:
    texts = [f"prompt number {i}" * (1 + i % 3) for i in range(24)]
    params = [SamplingParams(max_tokens=20 + i, seed=i, n=1 + i % 3, logprobs=2 if i % 5 == 0 else None) for i in range(24)]
    with LLM(str(model), device="cpu", **SIMULATED) as llm:
        expected = llm.generate(texts, params)

    async def test() -> None:
        async with engine_of(model, overlap=overlap) as engine:
            answers = await asyncio.gather(*(complete(engine, t, p) for t, p in zip(texts, params, strict=True)))
            for answer, want in zip(answers, expected, strict=True):
                for delta, sample in zip(answer, want.outputs, strict=True):
                    assert (delta.token_ids, delta.text) == (sample.token_ids, sample.text)
                    assert (delta.finish_reason, delta.stop_reason) == (sample.finish_reason, sample.stop_reason)
                    given = [dict(zip(p.token_ids, p.logprobs, strict=True)) for p in delta.logprobs]
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
            [cut] = await complete(engine, "go on", SamplingParams(max_tokens=200, ignore_eos=True, seed=1, stop=(stop,)))
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
            await until(lambda: engine.stats.num_requests_running == 0)  # all of it has arrived, and nobody has looked
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
                ("", SamplingParams()), ([1, 10_000], SamplingParams()), ("x" * 300, SamplingParams()),
                ("x", SamplingParams(n=5)), ("x", SamplingParams(stop_token_ids=(2**70,))),
            ):  # fmt: skip
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
            results = await asyncio.gather(*(outcome(complete(engine, f"{i}", params)) for i in range(40)))
            refused = [r for r in results if isinstance(r, Overloaded)]
            done = [r[0] for r in results if not isinstance(r, DovetailError)]
            assert len(refused) + len(done) == 40
            assert refused
            assert len(done) >= 4
            assert all(len(d.token_ids) == 20 for d in done)
            await until(quiet(engine))
            assert (await complete(engine, "again", params))[0].finish_reason == "length"

    run(test())


# What goes wrong.


def test_a_killed_process_is_replaced(model: Path) -> None:
    async def test() -> None:
        async with engine_of(model, **faulty(step_seconds=0.02)) as engine:
            waiters = [asyncio.create_task(outcome(complete(engine, f"{i}", LONG))) for i in range(5)]
            await until(lambda: engine.stats.num_requests_running == 5)
            old = engine.pid
            assert old is not None
            os.kill(old, signal.SIGKILL)
            errors = await asyncio.gather(*waiters)
            assert {type(e) for e in errors} == {EngineDead}
            assert "signal 9" in errors[0].message
            assert engine.state == "restarting"
            with pytest.raises(EngineUnavailable, match="restarting"):
                await anext(engine.generate("x", LONG))
            assert quiet(engine)()
            await until(lambda: engine.state == "ready")
            assert engine.pid != old
            assert engine.num_restarts == 1
            assert len((await complete(engine, "x", SamplingParams(max_tokens=3, ignore_eos=True)))[0].token_ids) == 3

    run(test())


@pytest.mark.parametrize("how", ["exit", "hang", "stop"])
def test_a_process_that_ends_or_stalls_in_a_step_is_replaced(model: Path, how: str) -> None:
    faults: dict[str, Any] = {"exit": {"exit_at": 3}, "hang": {"hang_at": 3}, "stop": {"step_seconds": 0.02}}[how]

    async def test() -> None:
        async with engine_of(model, stall_timeout=1, **faulty(**faults)) as engine:
            waiters = [asyncio.create_task(outcome(complete(engine, f"{i}", LONG))) for i in range(2)]
            if how == "stop":
                await until(lambda: engine.stats.num_requests_running > 0)
                assert engine.pid is not None
                os.kill(engine.pid, signal.SIGSTOP)
            errors = await asyncio.gather(*waiters)
            assert {type(e) for e in errors} == {EngineDead}
            assert {"exit": "exit status 3", "hang": "step has not ended", "stop": "no sign of life"}[how] in errors[0].message
            await until(lambda: engine.state == "ready")
            assert (await complete(engine, "x", SamplingParams(max_tokens=1)))[0].finish_reason

    run(test())


def test_a_long_silence_of_the_front_end_is_not_the_engines(model: Path) -> None:
    async def test() -> None:
        async with engine_of(model, stall_timeout=1) as engine:
            time.sleep(1.5)  # noqa: ASYNC251 - the point: this loop is stuck, not the engine
            await asyncio.sleep(0.3)
            assert engine.state == "ready"
            assert engine.num_restarts == 0

    run(test())


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_that_raises_fails_its_requests_only(model: Path, overlap: bool) -> None:
    async def test() -> None:
        async with engine_of(model, overlap=overlap, **faulty(raise_at=5)) as engine:
            pid = engine.pid
            errors = await asyncio.gather(*(outcome(complete(engine, f"{i}", LONG)) for i in range(3)))
            assert any(isinstance(e, StepFailed) and "simulated fault" in e.message for e in errors)
            await until(quiet(engine))
            assert (await complete(engine, "x", LONG))[0].finish_reason == "length"
            assert (engine.pid, engine.num_restarts, engine.stats.num_failed_steps) == (pid, 0, 1)

    run(test())


def test_a_model_without_its_files_is_refused_at_once(model: Path) -> None:
    config = load_config(model=str(model), device="cpu", **SIMULATED)
    (model / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        AsyncEngine(config)
    (model / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        AsyncEngine(config)


BROKEN = """
from dovetail import Provider, hookimpl

def build(context, options):
    raise {error}

@hookimpl
def dovetail_workers():
    return [Provider("breaks", "", build)]
"""


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        ("ValueError('no such device')", PluginError, "dovetail-breaks:breaks could not be built: ValueError: no such device"),
        ("__import__('dovetail').errors.CheckpointError('model.safetensors: cut short')", CheckpointError, "cut short"),
        ("SystemExit(7)", EngineDead, "exit status 7"),
    ],
)
def test_what_keeps_the_process_from_starting_is_raised(
    model: Path, simulated: Path, error: str, expected: type[DovetailError], message: str
) -> None:
    (simulated / f"breaks_{expected.code}.py").write_text(BROKEN.format(error=error))
    install(simulated, f"breaks_{expected.code}", "breaks")

    async def test() -> None:
        engine = AsyncEngine(load_config(model=str(model), device="cpu", attention="simulated", worker="breaks"))
        with pytest.raises(expected, match=message):
            await engine.start()
        assert engine.state == "closed"
        with pytest.raises(EngineUnavailable):
            await anext(engine.generate("x", LONG))
        await engine.close()

    run(test())


def test_another_plan_than_ours_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        engine = AsyncEngine(load_config(model=str(model), device="cpu", **SIMULATED))
        monkeypatch.setattr(Plan, "fingerprint", property(lambda self: "another"))
        with pytest.raises(PluginError, match="another plan"):
            await engine.start()
        await engine.close()

    run(test())


def test_another_version_than_ours_is_refused(model: Path, simulated: Path) -> None:
    metadata = next(simulated.glob("dovetail_simulated-*.dist-info")) / "METADATA"

    async def test() -> None:
        engine = AsyncEngine(load_config(model=str(model), device="cpu", **SIMULATED))
        metadata.write_text(metadata.read_text().replace("Version: 0.1.0", "Version: 0.2.0"))
        with pytest.raises(PluginError, match=r"the plan has dovetail-simulated 0\.1\.0, here is 0\.2\.0"):
            await engine.start()
        await engine.close()

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
from dovetail.config import load_config
from dovetail.serving import AsyncEngine
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


def alive(pid: int) -> bool:
    """A zombie that its new parent has not buried yet is dead."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


# Frames.


def test_frames_travel_and_bad_ones_are_refused() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        big = wire.Loading("x" * 3_000_000, 1, 2)
        sender = asyncio.run(_send_and_read(ours, theirs, wire.encode(big)))
        assert wire.from_engine.decode(sender) == big
        ours.sendall(b"\xff\xff\xff\xff")
        with pytest.raises(ValueError, match="a frame of 4294967295 bytes"):
            wire.read_frame(theirs)
        ours.sendall((10).to_bytes(4, "little") + b"half")
        ours.close()
        assert wire.read_frame(theirs) is None


async def _send_and_read(ours: socket.socket, theirs: socket.socket, frame: bytes) -> bytes:
    read = asyncio.create_task(asyncio.to_thread(wire.read_frame, theirs))
    await asyncio.to_thread(ours.sendall, frame)
    body = await read
    assert body is not None
    return body


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", (3).to_bytes(4, "little") + b"\xc1\xc1\xc1"])
def test_an_engine_that_hears_nonsense_ends(garbage: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            command = [sys.executable, "-m", "dovetail.engine_process", str(theirs.fileno())]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True)
        ours.sendall(garbage)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "Error" in errors


def test_an_engine_that_talks_nonsense_is_replaced(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with engine_of(model, **faulty(step_seconds=0.02)) as engine:
            waiter = asyncio.create_task(outcome(complete(engine, "x", LONG)))
            await until(lambda: engine.stats.num_requests_running == 1)
            with monkeypatch.context() as patch:
                patch.setattr(wire, "MAX_FRAME", 1)
                assert isinstance(await waiter, EngineDead)
            await until(lambda: engine.state == "ready")

    run(test())


def test_a_signal_for_the_whole_group_leaves_the_engine_to_its_front_end(model: Path) -> None:
    async def test() -> None:
        async with engine_of(model, **faulty(step_seconds=0.01)) as engine:
            assert engine.pid is not None
            running = asyncio.create_task(complete(engine, "x", SamplingParams(max_tokens=30, ignore_eos=True)))
            await until(lambda: engine.num_live == 1)
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(engine.pid, number)
            [whole] = await running
            assert len(whole.token_ids) == 30

    run(test())


def test_two_engines_live_side_by_side(model: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", max_len=64)

    async def test() -> None:
        async with engine_of(model) as one, engine_of(other) as two:
            params = SamplingParams(max_tokens=5, seed=3, ignore_eos=True)
            a, b = await asyncio.gather(complete(one, "x", params), complete(two, "x", params))
            assert a == b
            assert one.pid != two.pid
            assert (one.plan.max_model_len, two.plan.max_model_len) == (256, 64)

    run(test())
