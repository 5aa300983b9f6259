"""What stands between plugins and the loop: each mistake is caught where it is made, and costs no
more than it must."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dovetail.engine.checks import CheckedKVCache, CheckedScheduler, CheckedWorker
from dovetail.engine.engine import Engine, OverlappedEngine
from dovetail.engine.kv_cache import PagedKVCache
from dovetail.engine.scheduler import TokenBudgetScheduler, fcfs
from dovetail.errors import PluginError
from dovetail.types import KVGroup, SequenceOutput, StepPlan, StepResult
from dovetail_testing.clock import VirtualClock
from dovetail_testing.engines import request
from dovetail_testing.simulated import SimulatedWorker

NAMES = ("dist:scheduler", "dist:kv", "dist:worker")


def groups_of(window: int | None) -> list[KVGroup]:
    full = KVGroup([0], "full", 4, 1)
    return [full] if window is None else [full, KVGroup([1], "sliding", 4, 1, window)]


def responsible(error: BaseException, part: str) -> str:
    return f"{part} ({getattr(error, 'provider', None)})"


def engine_with(
    *,
    overlap: bool = False,
    scheduler: Callable[[Any], Any] = lambda s: s,
    kv: Callable[[Any], Any] = lambda kv: kv,
    worker: Callable[[Any], Any] = lambda w: w,
    window: int | None = None,
) -> Engine:
    """Parts as they are, each given to a function that breaks it."""
    groups = groups_of(window)
    num_blocks = [40] * len(groups)
    clock = VirtualClock()
    simulated = SimulatedWorker(groups)
    simulated.allocate(num_blocks)
    blocks = CheckedKVCache(kv(PagedKVCache(groups, num_blocks)), NAMES[1])
    inner = scheduler(TokenBudgetScheduler(blocks, fcfs, max_num_seqs=2, max_num_batched_tokens=16))
    checked = CheckedScheduler(inner, NAMES[0], responsible, 16, clock)
    loop = OverlappedEngine if overlap else Engine
    return loop(
        checked,
        blocks,
        CheckedWorker(worker(simulated), NAMES[2], 64),
        clock=clock,
        max_num_waiting=99,
        responsible=responsible,
    )


def breaking(method: str, at: int, instead: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What `method` returns at its `at`-th call goes through `instead`, which may raise."""

    def wrap(part: Any) -> Any:
        sound, calls = getattr(part, method), 0

        def broken(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            result = sound(*args, **kwargs)
            return instead(result) if calls == at else result

        setattr(part, method, broken)
        return part

    return wrap


def boom(result: Any) -> Any:
    raise RuntimeError("boom")


def run(engine: Engine) -> tuple[dict[tuple[str, int], list[int]], dict[str, str]]:
    """All tokens, and errors by request; four requests, of which two run at a time."""
    tokens: dict[tuple[str, int], list[int]] = {}
    errors: dict[str, str] = {}
    for i in range(4):
        engine.add(request(f"r{i}", list(range(i, i + 9)), 12, seed=i))
    for _ in range(500):
        news: list[SequenceOutput] = engine.step()
        for o in news:
            tokens.setdefault((o.request_id, o.sample_index), []).extend(o.token_ids)
        errors |= {o.request_id: o.error[1] for o in news if o.error}
        if not engine.has_work:
            assert engine.kv.num_used == 0
            return tokens, errors
    raise AssertionError("somebody waits for ever")


def change(**fields: Any) -> Callable[[Any], Any]:
    """A plan or result with other fields; a function is given the old value."""

    def instead(struct: Any) -> Any:
        for name, value in fields.items():
            setattr(struct, name, value(getattr(struct, name)) if callable(value) else value)
        return struct

    return instead


BAD_PLANS = {
    "no plan": lambda plan: "plan",
    "no rows": lambda plan: StepPlan(0, [], [], [], [], []),
    "an unknown sequence": change(seq_ids=lambda ids: [99, *ids[1:]]),
    "a sequence twice": change(seq_ids=lambda ids: [ids[0]] * len(ids)),
    "a row too few": change(num_tokens=lambda n: n[:-1]),
    "no tokens for a row": change(num_tokens=lambda n: [0, *n[1:]]),
    "too many tokens": change(num_tokens=lambda n: [17, *n[1:]]),
    "half a token": change(num_tokens=lambda n: [1.5, *n[1:]]),
    "NaN": change(num_computed=lambda n: [float("nan"), *n[1:]]),
    "another place": change(num_computed=lambda n: [n[0] + 1, *n[1:]]),
}
BAD_RESULTS = {
    "no result": lambda result: None,
    "a row too few": change(token_ids=lambda t: t[:-1]),
    "no token": change(token_ids=lambda t: [[], *t[1:]]),
    "two tokens": change(token_ids=lambda t: [[1, 2], *t[1:]]),
    "half a token": change(token_ids=lambda t: [[1.5], *t[1:]]),
    "a token that is not in the vocabulary": change(token_ids=lambda t: [[64], *t[1:]]),
    "a negative token": change(token_ids=lambda t: [[-1], *t[1:]]),
    "logprobs of other rows": change(logprobs=[[], [], [], []]),
}
BAD_BLOCKS = {
    "none": lambda added: [],
    "the null block": lambda added: [[0]],
    "one that is not there": lambda added: [[40]],
    "NaN": lambda added: [[float("nan")]],
    "no list": lambda added: 7,
    "text": lambda added: [["1"]],
}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("part", "method", "bad", "name"),
    [
        *(("scheduler", "schedule", bad, NAMES[0]) for bad in BAD_PLANS.values()),
        *(("worker", "sample", bad, NAMES[2]) for bad in BAD_RESULTS.values()),
        *(("kv", "grow", bad, NAMES[1]) for bad in BAD_BLOCKS.values()),
    ],
    ids=[
        *(f"plan: {k}" for k in BAD_PLANS),
        *(f"result: {k}" for k in BAD_RESULTS),
        *(f"blocks: {k}" for k in BAD_BLOCKS),
    ],
)
def test_a_wrong_answer_fails_the_step_and_nobody_else(
    part: str, method: str, bad: Callable[[Any], Any], name: str, overlap: bool
) -> None:
    expected, none = run(engine_with(overlap=overlap))
    assert not none
    tokens, errors = run(engine_with(overlap=overlap, **{part: breaking(method, 4, bad)}))  # type: ignore[arg-type]
    assert 1 <= len(errors) <= 2
    assert all(name in message for message in errors.values()), errors
    assert {k: t for k, t in tokens.items() if k[0] not in errors} == {
        k: t for k, t in expected.items() if k[0] not in errors
    }


def test_a_scheduler_that_does_not_take_a_request_fails_that_request() -> None:
    expected, _ = run(engine_with())
    tokens, errors = run(engine_with(scheduler=breaking("add", 2, boom)))
    assert set(errors) == {"r1"}
    assert all(tokens[key] == expected[key] for key in expected if key[0] != "r1")


@pytest.mark.parametrize("method", ["computed", "trim"])
def test_a_block_manager_that_fails_after_a_step_fails_that_sequence(method: str) -> None:
    expected, _ = run(engine_with(window=8))
    tokens, errors = run(engine_with(window=8, kv=breaking(method, 3, boom)))
    assert len(errors) == 1
    assert NAMES[1] in next(iter(errors.values()))
    assert all(tokens[key] == expected[key] for key in expected if key[0] not in errors)


def test_a_scheduler_that_does_not_let_go_ends_the_engine_by_name() -> None:
    with pytest.raises(
        PluginError, match=r"scheduler .*: failed to remove a sequence: RuntimeError: boom"
    ):
        run(engine_with(scheduler=breaking("remove", 1, boom)))


def test_drafts_and_rows_that_failed_may_have_other_numbers_of_tokens() -> None:
    worker = CheckedWorker(SimulatedWorker(groups_of(None)), "w", 64)
    plan = StepPlan(
        0,
        [1, 2, 3],
        [3, 1, 4],
        [5, 5, 0],
        [True, True, False],
        [[], [], []],
        draft_token_ids=[[7, 7], [], []],
    )
    for rows, failed in (([[7, 7, 1], [2], []], {}), ([[1], [], []], {2: "NaN"})):
        result = StepResult(0, rows, failed=failed)
        assert worker.sample((plan, result)) is result
    for rows in ([[7, 7, 1, 1], [2], []], [[7], [2], [3]], [[], [2], []]):
        with pytest.raises(PluginError, match="tokens for a row"):
            worker.sample((plan, StepResult(0, rows)))
