"""Sequences that wait for what another one is computing: how much is computed, and what becomes of
them when it ends early."""

from __future__ import annotations

import pytest

from dovetail.engine.checks import CheckedKVCache
from dovetail.engine.engine import Engine
from dovetail.engine.kv_cache import PagedKVCache
from dovetail.engine.scheduler import TokenBudgetScheduler, fcfs
from dovetail.errors import PluginError
from dovetail.plugin.adapters import kv_cache_from_0_1, prefix_cache_from_0_1
from dovetail.plugin.extension_points import EXTENSION_POINTS
from dovetail.sequence import Sequence
from dovetail.types import Request, SamplingParams
from dovetail_testing.clock import VirtualClock
from dovetail_testing.dictionary import DictionaryIndex
from dovetail_testing.engines import Outputs, Parts, Setup, WatchedEngine, collect, request, run
from dovetail_testing.simulated import Faults, SimulatedWorker

SHARED = list(range(1, 25))


def make_engine(faults: Faults | None = None, **setup: int) -> WatchedEngine:
    def kv(limits: Setup) -> PagedKVCache:
        return PagedKVCache(
            limits.groups, limits.num_blocks, DictionaryIndex(limits.block_size, len(limits.groups))
        )

    def scheduler(limits: Setup, manager: PagedKVCache) -> TokenBudgetScheduler:
        return TokenBudgetScheduler(
            manager, fcfs, max_num_seqs=limits.max_num_seqs, max_num_batched_tokens=limits.budget
        )

    return Parts(kv, scheduler).engine(
        Setup(**{"spare_blocks": 200, "max_num_seqs": 8, "budget": 16, **setup}), faults
    )


def alike(count: int = 6) -> list[Request]:
    return [request(f"r{i}", [*SHARED, 30 + i], 4, seed=i) for i in range(count)]


def step(engine: Engine, outputs: Outputs) -> None:
    collect([o for o in engine.step() if o.finish_reason != "abort"], outputs)


def said_alone() -> Outputs:
    return {key: said for r in alike() for key, said in run(make_engine(), [r]).items()}


def test_they_wait_and_others_overtake_them() -> None:
    engine = make_engine()
    for r in [*alike(), request("other", [60] * 9, 3)]:
        engine.add(r)
    plan = engine.schedule(in_flight=False)
    assert plan is not None
    assert (plan.seq_ids, plan.num_tokens) == ([0], [16])
    engine.finish_step(engine.submit(plan) or pytest.fail("no step"))
    engine.step()
    assert [s.request.request_id for s in engine.scheduler.running] == ["r0", "other"]


def test_an_abort_of_the_one_waited_for_lets_one_of_the_others_compute() -> None:
    engine, outputs = make_engine(), Outputs()
    for r in alike():
        engine.add(r)
    step(engine, outputs)
    engine.abort("r0")
    step(engine, outputs)
    assert len(engine.scheduler.running) == 1
    while engine.has_work:
        step(engine, outputs)
    assert outputs == {key: said for key, said in said_alone().items() if key[0] != "r0"}
    assert engine.snapshot().num_prefix_hit_tokens == 4 * 24 + 16, (
        "the second has what the first had computed"
    )


def test_an_abort_of_one_that_waits_leaves_no_trace() -> None:
    engine, outputs = make_engine(), Outputs()
    for r in alike():
        engine.add(r)
    step(engine, outputs)
    for i in (1, 3, 5):
        engine.abort(f"r{i}")
    engine.watch.sequences()
    while engine.has_work:
        step(engine, outputs)
    expected = said_alone()
    assert all(outputs[f"r{i}", 0] == expected[f"r{i}", 0] for i in (0, 2, 4))
    assert engine.kv.num_used == 0


def test_a_failed_step_of_the_one_waited_for_fails_nobody_else() -> None:
    engine = make_engine(Faults(raise_at=1))
    for r in alike():
        engine.add(r)
    failed = [o.request_id for o in engine.step() if o.error]
    assert failed == ["r0"]
    outputs = Outputs()
    while engine.has_work:
        step(engine, outputs)
    assert outputs == {key: said for key, said in said_alone().items() if key[0] != "r0"}


def test_a_reset_ends_the_waiting() -> None:
    engine, outputs = make_engine(), Outputs()
    for r in alike():
        engine.add(r)
    step(engine, outputs)
    assert isinstance(engine.kv, PagedKVCache)
    engine.kv.reset_prefix_cache()
    step(engine, outputs)
    assert len(engine.scheduler.running) == 2
    while engine.has_work:
        step(engine, outputs)
    assert outputs == said_alone()


class Liar(DictionaryIndex):
    """Says of every block that somebody computes it."""

    def expected_from(self, seq: Sequence, block: int) -> int | None:
        return 0


def test_a_prefix_cache_that_lies_delays_and_stops_nobody() -> None:
    setup = Setup(spare_blocks=200, max_num_seqs=8)
    kv = PagedKVCache(setup.groups, setup.num_blocks, Liar(4, 1))
    engine = Parts(
        lambda s: kv,
        lambda s, manager: TokenBudgetScheduler(
            manager, fcfs, max_num_seqs=8, max_num_batched_tokens=16
        ),
    ).engine(setup)
    assert run(engine, alike()) == said_alone()


def test_prompts_whose_log_probabilities_are_asked_for_do_not_wait() -> None:
    engine = make_engine(budget=64)
    params = SamplingParams(max_tokens=2, prompt_logprobs=0)
    for i in range(2):
        engine.add(Request(f"r{i}", [*SHARED, 30 + i], params, 2, i, []))
    plan = engine.schedule(in_flight=False)
    assert plan is not None
    assert plan.num_tokens == [25, 25]


@pytest.mark.parametrize("spare_blocks", [0, 2, 5])
def test_preemption_of_the_one_waited_for(spare_blocks: int) -> None:
    engine = make_engine(spare_blocks=spare_blocks, budget=4)
    assert run(engine, alike()) == said_alone()


# Contract 0.1: parts that know nothing of waiting.


class OldBlocks:
    """A KV-cache manager as it was, over one of today."""

    def __init__(self, setup: Setup) -> None:
        self._kv = PagedKVCache(
            setup.groups, setup.num_blocks, prefix_cache_from_0_1(OldIndex(4, 1))
        )
        for name in (
            "groups",
            "num_blocks",
            "faults",
            "grow",
            "share",
            "computed",
            "block_ids",
            "trim",
            "count",
            "free",
        ):
            setattr(self, name, getattr(self._kv, name))

    def reuse(self, seq: Sequence, num_tokens: int) -> int:
        found = self._kv.reuse(seq, num_tokens)
        assert found is not None
        return found

    @property
    def num_used(self) -> int:
        return self._kv.num_used

    @property
    def num_total(self) -> int:
        return self._kv.num_total


class OldIndex:
    """A prefix cache as it was."""

    def __init__(self, block_size: int, num_groups: int) -> None:
        index = DictionaryIndex(block_size, num_groups)
        for name in ("match", "insert", "claim", "keep", "evict", "forget", "reset"):
            setattr(self, name, getattr(index, name))


def test_parts_of_the_contract_before_run_and_let_nobody_wait() -> None:
    setup = Setup(spare_blocks=200, max_num_seqs=8, budget=64)
    worker = SimulatedWorker(setup.groups)
    worker.allocate(setup.num_blocks)
    kv = kv_cache_from_0_1(OldBlocks(setup))
    assert all(not s.missing(kv) for s in EXTENSION_POINTS if s.name == "kv_cache")
    scheduler = TokenBudgetScheduler(kv, fcfs, max_num_seqs=8, max_num_batched_tokens=64)
    engine = Engine(scheduler, kv, worker, clock=VirtualClock(), max_num_waiting=99)
    assert run(engine, alike()) == said_alone()
    assert run(engine, alike()) == said_alone()
    assert engine.snapshot().num_prefix_hit_tokens > 0
    with pytest.raises(PluginError, match=r"contract 0\.1"):
        kv.reset_prefix_cache()


# What the loop relies on.


@pytest.mark.parametrize("answer", [None, -1, 99, 1.0])
def test_a_manager_that_answers_nonsense_is_named(answer: object) -> None:
    setup = Setup()
    kv = PagedKVCache(setup.groups, setup.num_blocks)
    kv.reuse = lambda *args, **kwargs: answer  # type: ignore[method-assign, return-value, assignment]
    checked = CheckedKVCache(kv, "dist:bad")
    seq = Sequence(0, request("r", [1] * 9), 0, [1] * 9)
    with pytest.raises(PluginError, match="asked for at most 8 tokens to share") as e:
        checked.reuse(seq, 8)
    assert e.value.provider == "dist:bad"
    if answer is None:
        assert checked.reuse(seq, 8, may_wait=True) is None
