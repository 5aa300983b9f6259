"""`LLM` in one thread: interrupts, several streams at once, scoring, defaults, and what could never
start."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dovetail.engine.engine import MAX_FAILED_STEPS
from dovetail.errors import CheckpointError, EngineDead, InvalidRequest, StepFailed
from dovetail.frontend.outputs import Delta
from dovetail.runtime.llm import LLM
from dovetail.sequence import Sequence
from dovetail.types import SamplingParams
from dovetail_testing.plugin import SIMULATED

pytestmark = [pytest.mark.usefixtures("simulated"), pytest.mark.timeout(60)]
LONG = SamplingParams(max_tokens=60, ignore_eos=True, seed=3)


@pytest.fixture(params=[False, True], ids=["plain", "overlapped"])
def llm(request: pytest.FixtureRequest, model: Path) -> Iterator[LLM]:
    with LLM(model, device="cpu", overlap=request.param, **SIMULATED) as made:
        yield made


def ids(deltas: Iterator[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def is_unused(llm: LLM) -> bool:
    stats = llm.engine.snapshot()
    return (
        not llm.engine.has_work
        and stats.kv_blocks_used == stats.num_requests_running == stats.num_requests_waiting == 0
    )


# Ctrl-C.


@pytest.mark.parametrize("method", ["submit", "sample"])
@pytest.mark.parametrize("step", [1, 2, 7])
def test_ctrl_c_within_a_step_ends_the_call_and_nothing_else(
    llm: LLM, method: str, step: int
) -> None:
    expected = llm.generate(["a", "b"], LONG)
    worker: Any = llm.engine.worker
    plain: Callable[..., Any] = getattr(worker, method)
    calls = 0

    def pressed(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*arguments)

    setattr(worker, method, pressed)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], LONG)
    assert calls <= step + 2, "it ends within a step"
    assert is_unused(llm)
    assert [o.token_ids for o in llm.generate(["a", "b"], LONG)] == [o.token_ids for o in expected]


@pytest.mark.parametrize("method", ["submit", "sample"])
def test_an_interrupt_raised_by_the_worker_leaves_a_usable_engine(llm: LLM, method: str) -> None:
    """As a second Ctrl-C does, which is not held back."""
    expected = llm.generate("a", LONG)[0].token_ids
    worker: Any = llm.engine.worker
    plain: Callable[..., Any] = getattr(worker, method)
    calls = 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return plain(*arguments)

    setattr(worker, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(llm.stream("a", LONG))
    assert is_unused(llm)
    assert ids(llm.stream("a", LONG)) == expected


def test_an_interrupt_between_steps_ends_a_stream_and_spares_the_others(llm: LLM) -> None:
    expected = [ids(llm.stream(p, LONG)) for p in "ab"]
    first, second = llm.stream("a", LONG), llm.stream("b", LONG)
    some = [*next(first).token_ids]
    next(second)
    with pytest.raises(KeyboardInterrupt):
        second.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert some + ids(first) == expected[0]
    assert is_unused(llm)


def test_the_handler_of_interrupts_is_put_back(llm: LLM) -> None:
    before = signal.getsignal(signal.SIGINT)
    list(llm.stream("a", LONG))
    assert signal.getsignal(signal.SIGINT) is before


def test_an_engine_whose_every_step_fails_says_so(llm: LLM) -> None:
    def fails(plan: Any) -> Any:
        raise RuntimeError("no device")

    llm.engine.worker.submit = fails  # type: ignore[method-assign]
    for _ in range(MAX_FAILED_STEPS - 1):
        with pytest.raises(StepFailed, match="no device"):
            llm.generate("a", LONG)
    with pytest.raises(
        EngineDead, match=f"{MAX_FAILED_STEPS} steps in a row have failed; the last: no device"
    ):
        llm.generate("a", LONG)


# Several at once.


def test_interleaved_streams_and_calls_say_what_each_says_alone(llm: LLM) -> None:
    rng = random.Random()
    prompts = [rng.choice("abcdef") * rng.randint(1, 40) for _ in range(5)]
    params = [
        SamplingParams(max_tokens=rng.randint(1, 50), seed=i, ignore_eos=True) for i in range(5)
    ]
    expected = [llm.generate(p, s)[0] for p, s in zip(prompts, params, strict=True)]
    streams = {i: llm.stream(p, s) for i, (p, s) in enumerate(zip(prompts, params, strict=True))}
    found: dict[int, list[int]] = {i: [] for i in streams}
    texts = dict.fromkeys(streams, "")
    while streams:
        i = rng.choice(list(streams))
        delta = next(streams[i], None)
        if delta is None:
            del streams[i]
            continue
        found[i] += delta.token_ids
        texts[i] += delta.text
        if rng.random() < 0.2:
            k = rng.randrange(5)
            assert llm.generate(prompts[k], params[k])[0].token_ids == expected[k].token_ids
    assert [found[i] for i in range(5)] == [e.token_ids for e in expected]
    assert [texts[i] for i in range(5)] == [e.text for e in expected]
    assert is_unused(llm)


def test_a_stream_that_is_left_does_not_run_the_others_to_their_end(llm: LLM) -> None:
    kept, left = llm.stream("a", LONG), llm.stream("b", LONG)
    next(kept)
    next(left)
    left.close()  # type: ignore[attr-defined]
    (request_id,) = llm.engine.requests
    assert llm.engine.requests[request_id][0].num_output_tokens < 10
    kept.close()  # type: ignore[attr-defined]
    assert is_unused(llm)


def test_ctrl_c_while_a_request_is_added_leaves_nothing_of_it(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = llm.generate("a", LONG)[0].token_ids

    def pressed(seq_id: int, request: Any, index: int, *rest: Any, **more: Any) -> Sequence:
        if index == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return Sequence(seq_id, request, index, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr("dovetail.engine.engine.Sequence", pressed)
        with pytest.raises(KeyboardInterrupt):
            llm.generate("b", SamplingParams(n=2))
    assert is_unused(llm)
    assert llm.generate("a", LONG)[0].token_ids == expected


def test_what_has_ended_holds_nothing(llm: LLM) -> None:
    """Under the overlapped loop a stop token comes with the next step already in flight."""
    params = SamplingParams(max_tokens=60, stop_token_ids=tuple(range(0, 256, 4)), seed=3)
    for _ in range(5):
        assert llm.generate("a", params)[0].finish_reason == "stop"
        assert is_unused(llm)


# Scoring.


@pytest.mark.parametrize("chunk", [16, 33, 256])
@pytest.mark.parametrize("overlap", [False, True])
def test_every_prompt_token_is_scored_however_the_prompt_is_chunked(
    model: Path, overlap: bool, chunk: int
) -> None:
    params, prompt = (
        SamplingParams(max_tokens=0, prompt_logprobs=1),
        [5 + i % 90 for i in range(180)],
    )
    scheduler = {"max_num_seqs": 4, "max_num_batched_tokens": chunk}
    with LLM(model, device="cpu", overlap=overlap, scheduler=scheduler, **SIMULATED) as llm:
        for out in llm.generate([prompt, prompt[:100]], params):
            assert out.prompt_logprobs is not None
            assert len(out.prompt_logprobs) == len(out.prompt_token_ids)
            assert (out.token_ids, out.finish_reason) == ([], "length")
        assert is_unused(llm)


# Defaults, limits.


def test_sampling_defaults_are_those_of_the_checkpoint(model: Path) -> None:
    (model / "generation_config.json").write_text(
        json.dumps({"temperature": 0.0, "top_k": 7, "repetition_penalty": 1.1})
    )
    with LLM(model, device="cpu", **SIMULATED) as llm:
        defaults = llm.default_params(max_tokens=None)
        assert (defaults.temperature, defaults.top_k, defaults.repetition_penalty) == (0, 7, 1.1)
        messages = [{"role": "user", "content": "hello"}]
        explicit = SamplingParams(max_tokens=None, temperature=0, top_k=7, repetition_penalty=1.1)
        assert llm.chat(messages).token_ids == llm.chat(messages, explicit).token_ids
        assert (
            llm.generate("x")[0].token_ids == llm.generate("x", llm.default_params())[0].token_ids
        )


@pytest.mark.parametrize("value", ["NaN", "1e400", "-1", "1e308", '"hot"', "true"])
def test_defaults_that_no_request_could_have_are_refused_at_the_start(
    model: Path, value: str
) -> None:
    (model / "generation_config.json").write_text(f'{{"temperature": {value}}}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json: temperature must be"):
        LLM(model, device="cpu", **SIMULATED)


def test_more_samples_than_may_wait_are_refused(model: Path) -> None:
    with LLM(model, device="cpu", max_num_waiting=3, **SIMULATED) as llm:
        with pytest.raises(InvalidRequest, match="n is 4, but only 3 sequences may wait"):
            llm.generate("a", SamplingParams(n=4))
        assert len(llm.generate("a", SamplingParams(n=3))[0].outputs) == 3


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-38, 9e-6])
def test_temperatures_next_to_zero_are_greedy(temperature: float) -> None:
    assert SamplingParams(temperature=temperature).greedy


@pytest.mark.parametrize(
    "values",
    [{"temperature": 1e308}, {"repetition_penalty": 1e308}, {"repetition_penalty": 1e-300}],
)
def test_numbers_that_float32_cannot_work_with_are_refused(values: dict[str, float]) -> None:
    (name,) = values
    with pytest.raises(InvalidRequest, match=f"{name} must be"):
        SamplingParams(**values)
