"""`AsyncEngine` when things go wrong: processes that die, stall, do not start or talk nonsense."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from async_engine import LONG, PATIENCE, complete, engine_of, faulty, outcome, quiet, run, until

from dovetail.errors import (
    CheckpointError,
    DovetailError,
    EngineDead,
    EngineUnavailable,
    PluginError,
    StepFailed,
)
from dovetail.plan import Plan
from dovetail.plugin.config import load_config
from dovetail.runtime import restarts, wire
from dovetail.runtime.serving import AsyncEngine
from dovetail.types import SamplingParams
from dovetail_testing.plugin import SIMULATED, install

pytestmark = pytest.mark.usefixtures("simulated")


# What goes wrong.


def test_a_killed_process_is_replaced(model: Path) -> None:
    async def test() -> None:
        async with engine_of(model, **faulty(step_seconds=0.02)) as engine:
            waiters = [
                asyncio.create_task(outcome(complete(engine, f"{i}", LONG))) for i in range(5)
            ]
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
            assert (
                len(
                    (await complete(engine, "x", SamplingParams(max_tokens=3, ignore_eos=True)))[
                        0
                    ].token_ids
                )
                == 3
            )

    run(test())


@pytest.mark.parametrize("how", ["exit", "hang", "stop"])
def test_a_process_that_ends_or_stalls_in_a_step_is_replaced(model: Path, how: str) -> None:
    faults: dict[str, Any] = {
        "exit": {"exit_at": 3},
        "hang": {"hang_at": 3},
        "stop": {"step_seconds": 0.02},
    }[how]

    async def test() -> None:
        async with engine_of(model, stall_timeout=1, **faulty(**faults)) as engine:
            waiters = [
                asyncio.create_task(outcome(complete(engine, f"{i}", LONG))) for i in range(2)
            ]
            if how == "stop":
                await until(lambda: engine.stats.num_requests_running > 0)
                assert engine.pid is not None
                os.kill(engine.pid, signal.SIGSTOP)
            errors = await asyncio.gather(*waiters)
            assert {type(e) for e in errors} == {EngineDead}
            assert {
                "exit": "exit status 3",
                "hang": "a step has been running",
                "stop": "sent no message",
            }[how] in errors[0].message
            await until(lambda: engine.state == "ready")
            assert (await complete(engine, "x", SamplingParams(max_tokens=1)))[0].finish_reason

    run(test())


def test_a_stopped_process_is_found_within_seconds_by_default(model: Path) -> None:
    async def test() -> None:
        async with engine_of(model, **faulty(step_seconds=0.02)) as engine:
            waiter = asyncio.create_task(outcome(complete(engine, "x", LONG)))
            await until(lambda: engine.stats.num_requests_running > 0)
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGSTOP)
            error = await asyncio.wait_for(waiter, 10)
            assert "sent no message" in error.message
            await until(lambda: engine.state == "ready")

    run(test())


def test_a_stalled_process_shows_its_stacks(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        async with engine_of(model, stall_timeout=1, **faulty(hang_at=2)) as engine:
            assert isinstance(await outcome(complete(engine, "x", LONG)), EngineDead)

    run(test())
    said = capfd.readouterr().err
    assert "Current thread" in said
    assert "simulated.py" in said


FORKING = """
import os, time
from dovetail import Provider, hookimpl
from dovetail_testing import plugin

def build(context, options):
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    return plugin._worker(context, plugin.SimulatedOptions(step_seconds=0.02))

@hookimpl
def dovetail_workers():
    return [Provider("forks", "", build, capabilities=plugin.CAN)]
"""


def test_the_end_of_a_process_is_noticed_though_a_child_holds_its_socket(
    model: Path, simulated: Path
) -> None:
    (simulated / "forks.py").write_text(FORKING)
    install(simulated, "forks", "forks")

    async def test() -> None:
        async with engine_of(model, worker="forks") as engine:
            waiter = asyncio.create_task(outcome(complete(engine, "x", LONG)))
            await until(lambda: engine.stats.num_requests_running > 0)
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            error = await asyncio.wait_for(waiter, 2)
            assert "signal 9" in error.message
            await until(lambda: engine.state == "ready")

    run(test())


def test_an_engine_that_serves_nobody_is_given_up(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "FIRST_BACKOFF", 0.01)

    async def test() -> None:
        async with engine_of(model, **faulty(exit_at=1)) as engine:
            for _ in range(restarts.MAX_RESTARTS + 1):
                await until(lambda: engine.state == "ready")
                assert isinstance(await outcome(complete(engine, "x", LONG)), EngineDead)
            await asyncio.wait_for(engine.failed.wait(), 5)
            with pytest.raises(
                EngineUnavailable, match="not restarted: the process ended with exit status 3"
            ):
                engine.check_ready()

    run(test())


def test_a_finished_request_makes_restarts_count_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = restarts.Restarts()
    assert [policy.failed(0) for _ in range(6)] == [0.5, 1, 2, 4, 4, None]
    assert policy.failed(1) == 0.5
    assert policy.count == 6
    assert 1 <= policy.seconds_left <= 0.5 + restarts.START_SECONDS


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
            errors = await asyncio.gather(
                *(outcome(complete(engine, f"{i}", LONG)) for i in range(3))
            )
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
        (
            "ValueError('no such device')",
            PluginError,
            "dovetail-breaks:breaks could not be built: ValueError: no such device",
        ),
        (
            "__import__('dovetail').errors.CheckpointError('model.safetensors: cut short')",
            CheckpointError,
            "cut short",
        ),
        ("SystemExit(7)", EngineDead, "exit status 7"),
    ],
)
def test_what_keeps_the_process_from_starting_is_raised(
    model: Path, simulated: Path, error: str, expected: type[DovetailError], message: str
) -> None:
    (simulated / f"breaks_{expected.code}.py").write_text(BROKEN.format(error=error))
    install(simulated, f"breaks_{expected.code}", "breaks")

    async def test() -> None:
        engine = AsyncEngine(
            load_config(model=str(model), device="cpu", attention="simulated", worker="breaks")
        )
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
        with pytest.raises(
            PluginError, match=r"the plan has dovetail-simulated 0\.1\.0, but 0\.2\.0 is installed"
        ):
            await engine.start()
        await engine.close()

    run(test())


# Frames.


def test_frames_travel_and_bad_ones_are_refused() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        big = wire.Loading("x" * 3_000_000, 1, 2)
        sender = asyncio.run(_send_and_read(ours, theirs, wire.encode(big)))
        assert wire.from_engine.decode(sender) == big
        ours.sendall(b"\xff\xff\xff\xff")
        with pytest.raises(ValueError, match="a frame has 4294967295 bytes"):
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


@pytest.mark.parametrize(
    "garbage", [b"\xff\xff\xff\xff", (3).to_bytes(4, "little") + b"\xc1\xc1\xc1"]
)
def test_an_engine_that_hears_nonsense_ends(garbage: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            command = [
                sys.executable,
                "-m",
                "dovetail.runtime.engine_process",
                str(theirs.fileno()),
            ]
            process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True
            )
        ours.sendall(garbage)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "Error" in errors


def test_an_engine_that_talks_nonsense_is_replaced(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
            running = asyncio.create_task(
                complete(engine, "x", SamplingParams(max_tokens=30, ignore_eos=True))
            )
            await until(lambda: engine.num_live == 1)
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(engine.pid, number)
            [whole] = await running
            assert len(whole.token_ids) == 30

    run(test())
