"""Every extension point × every fault: what it costs, who is named, and that nobody else notices.

The table is `EXTENSION_POINTS` × `FAULTS`: a fault in a request-scoped extension point costs its
request, one in a step-scoped extension point the requests of the step, with a typed error that
names `dovetail-chaos:chaos`; all others' outputs are what they are without it. What hangs or
crashes costs the engine process, which is replaced. `make test` leaves out processes that import
torch, and all crashes but one; `make soak` takes all.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from async_engine import complete, engine_of, outcome, run, until
from chaos import VICTIM
from checkpoints import Checkpoint

from dovetail import LLM
from dovetail.assembly.compose import build_server
from dovetail.composition.resolution import resolve
from dovetail.errors import ERRORS, DovetailError, EngineDead, PluginError, StepFailed
from dovetail.plugin.config import load_config
from dovetail.types import Request, SamplingParams, SequenceOutput
from dovetail_testing.plugin import SIMULATED, install, make_model

TESTS = Path(__file__).parent
CULPRIT = "dovetail-chaos:chaos"
SEATS = 2
MAX_TOKENS = 12


class ExtensionPoint(NamedTuple):
    scope: str
    """What a fault costs: the request that met it, or the requests of its step."""
    torch: bool
    """It is part of torch's worker; the others run with the simulated one."""


EXTENSION_POINTS = {
    "speculation": ExtensionPoint("request", False),
    "prefix_cache": ExtensionPoint("request", False),
    "eviction": ExtensionPoint("request", False),
    "scheduler": ExtensionPoint("step", False),
    "kv_cache": ExtensionPoint("step", False),
    "worker": ExtensionPoint("step", False),
    "attention": ExtensionPoint("step", True),
    "quantization": ExtensionPoint("step", True),
    "architecture": ExtensionPoint("step", True),
}
"""Those of the engine. `model`, `server` and `routes` live in the front-end, and have tests of
their own below."""
FAULTS = ("raise", "nan", "shape", "dtype")
"""In use, and survived by the process."""
FATAL = ("hang", "crash")
TORCH_IN_SOAK = [
    pytest.param(name, marks=pytest.mark.soak) if s.torch else name
    for name, s in EXTENSION_POINTS.items()
]
"""What the parts of torch's worker do here, the simulated worker's show too."""
PROCESSES = [
    pytest.param(
        name, fault, marks=[pytest.mark.soak] * (s.torch or (fault == "crash" and name != "worker"))
    )
    for name, s in EXTENSION_POINTS.items()
    for fault in FATAL
]
"""In the soak: processes that import torch, and crashes that show what another one shows."""


@pytest.fixture
def chaos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install it, and the simulated worker, for this process and those that it starts."""
    site = tmp_path / "site"
    install(site)
    install(site, "chaos", "chaos")
    path = os.pathsep.join(filter(None, (str(site), str(TESTS), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.syspath_prepend(site)


@pytest.fixture
def values(
    tmp_path: Path, checkpoint: Callable[[str], Checkpoint]
) -> Callable[..., dict[str, Any]]:
    """The settings of an engine with the chaos plugin in an extension point."""

    def of(extension_point: str, fault: str, at: int = 8) -> dict[str, Any]:
        misbehaving: dict[str, Any] = {"use": "chaos", "fault": fault, "at": at}
        if extension_point == "speculation":
            misbehaving["adaptive"] = (
                False  # or it is asked only as often as the machine makes it worth
            )
        common: dict[str, Any] = {
            "device": "cpu",
            "overlap": False,
            "dtype": "float32",
            "prefix_cache": "none",
        }
        common["scheduler"] = {"max_num_seqs": SEATS}
        if EXTENSION_POINTS[extension_point].torch:
            common |= {"model": str(checkpoint("llama-2").folder), "attention": "torch-reference"}
        else:
            common |= {
                "model": str(make_model(tmp_path / "model")),
                **SIMULATED,
                "kv_cache": {"block_size": 4},
            }
        if extension_point == "eviction":  # a cache so small that blocks are given up
            common["kv_cache"] |= {"memory_gb": 26 * 4 * 128 / 2**30}
            return common | {
                "prefix_cache": {"use": "hash", "eviction": {**misbehaving, "at": 1}},
                "max_model_len": 40,
            }
        old = common.get(extension_point)
        return common | {extension_point: {**(old if isinstance(old, dict) else {}), **misbehaving}}

    return of


def requests() -> list[Request]:
    """Five, of which two run at a time. The second is the victim of request-scoped faults."""
    prompts = [[3 + i, *range(20, 29 + i)] for i in range(5)]
    prompts[1][0] = VICTIM
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)
    return [Request(f"r{i}", p, params, MAX_TOKENS, 0, [], 0) for i, p in enumerate(prompts)]


class Ended(NamedTuple):
    tokens: list[int]
    error: DovetailError | None


def drive(llm: LLM) -> dict[str, Ended]:
    """Every request's end. Fails if one does not come."""
    ends = {r.request_id: Ended([], None) for r in requests()}
    for request in requests():
        llm.engine.add(request)
    for _ in range(2000):
        news: list[SequenceOutput] = llm.engine.step()
        for output in news:
            ends[output.request_id].tokens.extend(output.token_ids)
            if output.error is not None:
                code, message = output.error
                ends[output.request_id] = Ended(
                    ends[output.request_id].tokens, ERRORS[code](message)
                )
        if not llm.engine.has_work:
            assert llm.engine.kv.num_used == 0, "blocks are left over"
            return ends
    raise AssertionError("somebody waits for ever")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("extension_point", EXTENSION_POINTS)
@pytest.mark.usefixtures("chaos")
def test_a_fault_costs_whom_it_concerns(
    values: Callable[..., dict[str, Any]], extension_point: str, fault: str
) -> None:
    with LLM(**values(extension_point, "none")) as sound:
        expected = drive(sound)
        again = drive(sound)
    assert all(end.error is None and len(end.tokens) == MAX_TOKENS for end in expected.values())
    assert again == expected
    with LLM(**values(extension_point, fault)) as llm:
        first, second = drive(llm), drive(llm)
    failed = {name: end.error for name, end in first.items() if end.error is not None}
    assert (
        1 <= len(failed) <= (1 if EXTENSION_POINTS[extension_point].scope == "request" else SEATS)
    )
    for error in failed.values():
        assert isinstance(error, StepFailed | PluginError)
        assert f"{extension_point} ({CULPRIT})" in error.message, error.message
    if extension_point in ("speculation", "prefix_cache"):
        assert set(failed) == {"r1"}
    if fault == "nan" and EXTENSION_POINTS[extension_point].torch:
        assert len(failed) == 1, "a NaN is its row's alone"
    for name, end in first.items():
        assert name in failed or end == expected[name], f"{name} is another because {failed} failed"
    for name, end in second.items():
        hit_again = name == "r1" and extension_point in ("speculation", "prefix_cache")
        assert hit_again or end == expected[name], f"{name} came after it"


@pytest.mark.parametrize("fault", ["build", "build-wrong"])
@pytest.mark.parametrize("extension_point", EXTENSION_POINTS)
@pytest.mark.usefixtures("chaos")
def test_what_cannot_be_built_is_named(
    values: Callable[..., dict[str, Any]], extension_point: str, fault: str
) -> None:
    with pytest.raises(PluginError, match=CULPRIT) as e:
        LLM(**values(extension_point, fault)).close()
    assert extension_point in e.value.message


@pytest.mark.parametrize("extension_point", TORCH_IN_SOAK)
@pytest.mark.usefixtures("chaos")
def test_what_is_slow_loses_nothing(
    values: Callable[..., dict[str, Any]], extension_point: str
) -> None:
    with LLM(**values(extension_point, "none")) as llm:
        expected = drive(llm)
    with LLM(**values(extension_point, "slow", at=4)) as llm:
        assert drive(llm) == expected


@pytest.mark.usefixtures("chaos")
def test_a_scheduler_that_schedules_nothing_does_not_keep_anybody_waiting(
    values: Callable[..., dict[str, Any]],
) -> None:
    with LLM(**values("scheduler", "starve")) as llm:
        llm.engine.scheduler.patience = 0.1  # type: ignore[attr-defined]
        ends = drive_until_idle(llm)
    errors = [end.error for end in ends.values()]
    assert all(isinstance(e, PluginError) and CULPRIT in e.message for e in errors)
    assert "none was scheduled for" in str(errors[0])


def drive_until_idle(llm: LLM) -> dict[str, Ended]:
    for request in requests():
        llm.engine.add(request)
    ends: dict[str, Ended] = {}
    while llm.engine.has_work:
        for output in llm.engine.step():
            if output.error is not None:
                code, message = output.error
                ends[output.request_id] = Ended([], ERRORS[code](message))
    return ends


@pytest.mark.parametrize(("extension_point", "fault"), PROCESSES)
@pytest.mark.usefixtures("chaos")
def test_what_hangs_or_crashes_costs_the_process(
    values: Callable[..., dict[str, Any]], extension_point: str, fault: str
) -> None:
    # Of a part of torch's worker, later than its warm-up.
    settings = values(
        extension_point,
        fault,
        at=(
            60
            if extension_point == "attention"
            else 8
            if EXTENSION_POINTS[extension_point].torch
            else 3
        ),
    )
    model = Path(settings.pop("model"))
    if EXTENSION_POINTS[extension_point].torch:
        model = Path("demo")  # a process of its own needs a tokenizer
        settings["worker"] = "torch"
    del settings["device"]
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)

    async def test() -> None:
        async with engine_of(model, stall_timeout=2, **{**SIMULATED, **settings}) as engine:
            prompts = [r.prompt_token_ids for r in requests()]
            errors = await asyncio.gather(*(outcome(complete(engine, p, params)) for p in prompts))  # type: ignore[arg-type]
            dead = [e for e in errors if isinstance(e, EngineDead)]
            assert dead
            assert (
                "signal 6" if fault == "crash" else f"in {extension_point} ({CULPRIT})"
            ) in dead[0].message
            await until(lambda: engine.state == "ready")
            assert engine.num_restarts == 1, "the process was not replaced"
            answer = await complete(engine, "x", SamplingParams(max_tokens=1))
            assert answer[0].finish_reason is not None

    run(test())


# The front-end's extension points.


@pytest.mark.usefixtures("chaos")
def test_a_model_or_server_that_cannot_be_built_is_named(
    values: Callable[..., dict[str, Any]],
) -> None:
    with pytest.raises(
        PluginError, match=f"model: {CULPRIT} could not be built: RuntimeError: chaos"
    ):
        resolve(load_config(model="chaos"))
    settings = {**values("worker", "none"), "server": {"use": "chaos", "fault": "build"}}
    config = load_config(**settings)
    with pytest.raises(
        PluginError, match=f"server: {CULPRIT} could not be built: RuntimeError: chaos"
    ):
        build_server(config, resolve(config, server=True))


@pytest.mark.usefixtures("chaos")
def test_a_route_fails_its_request(values: Callable[..., dict[str, Any]]) -> None:
    from fastapi.testclient import TestClient

    from dovetail.runtime.serving import AsyncEngine
    from dovetail_server_openai.app import make_app

    settings = {**values("worker", "none"), "server": "openai"}
    config = load_config(**settings)
    engine = AsyncEngine(config, server=True)
    server: Any = build_server(config, engine.plan)
    app = make_app(engine, server._options, server._routes, server._responsible)
    with TestClient(app, raise_server_exceptions=False) as client:
        for fault in ("raise", "nan", "shape", "dtype"):
            answer: httpx.Response = client.get(f"/chaos/{fault}")
            assert answer.status_code == 500, fault
            assert f"routes ({CULPRIT})" in answer.json()["error"]["message"], fault
            assert client.get("/version").status_code == 200
        assert client.get("/chaos/slow").json() == client.get("/chaos/none").json() == {"x": 1.0}
