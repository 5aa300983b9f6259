"""Scheduler, block manager and both loops against a worker whose every answer depends on the cache's contents."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dovetail.engine import Engine, OverlappedEngine
from dovetail.errors import Overloaded
from dovetail.kv_cache import PagedKVCache, blocks_per_sequence
from dovetail.scheduler import TokenBudgetScheduler, fcfs, priority
from dovetail.testing.simulated import Faults, SimulatedWorker
from dovetail.types import KVGroup, Request, SamplingParams, SequenceOutput

SOAK = int(os.environ.get("DOVETAIL_SOAK", "1"))
"""How many times the usual number of examples."""
MAX_LEN = 48
EOS = 7


def groups_of(block_size: int, window: int | None) -> list[KVGroup]:
    full = KVGroup([0], "full", block_size, 1)
    return [full] if window is None else [full, KVGroup([1], "sliding", block_size, 1, window)]


def make_engine(
    *, overlap: bool = False, block_size: int = 4, window: int | None = None, budget: int = 16, seats: int = 4,
    spare_blocks: int = 0, order: Any = fcfs, faults: Faults | None = None, max_num_waiting: int = 1000,
) -> Engine:  # fmt: skip
    groups = groups_of(block_size, window)
    num_blocks = [1 + spare_blocks + blocks_per_sequence(g, MAX_LEN, budget) for g in groups]
    worker = SimulatedWorker(groups, faults=faults)
    worker.allocate(num_blocks)
    kv = PagedKVCache(groups, num_blocks)
    scheduler = TokenBudgetScheduler(kv, order, max_num_seqs=seats, max_num_batched_tokens=budget)
    return (OverlappedEngine if overlap else Engine)(scheduler, kv, worker, max_num_waiting=max_num_waiting)


def request(name: str, prompt: list[int], max_tokens: int = 8, *, n: int = 1, seed: int = 0, level: int = 0) -> Request:
    max_tokens = min(max_tokens, MAX_LEN - len(prompt))
    return Request(name, prompt, SamplingParams(n=n, max_tokens=max_tokens), max_tokens, seed, [EOS], level)


def collect(outputs: list[SequenceOutput], into: dict[tuple[str, int], list[int]]) -> None:
    for o in outputs:
        into.setdefault((o.request_id, o.sample_index), []).extend(o.token_ids)


def run(engine: Engine, requests: list[Request], arrivals: list[int] | None = None) -> dict[tuple[str, int], list[int]]:
    """All outputs; request i is added before step `arrivals[i]`."""
    pending = sorted(zip(arrivals or [0] * len(requests), range(len(requests)), strict=True))
    tokens: dict[tuple[str, int], list[int]] = {}
    for step in range(10_000):
        while pending and pending[0][0] <= step:
            engine.add(requests[pending.pop(0)[1]])
        if not engine.has_work and not pending:
            assert engine.kv.num_used == 0
            return tokens
        collect(engine.step(), tokens)
    raise AssertionError("somebody starves")


prompts = st.lists(st.integers(0, 63), min_size=1, max_size=30)


@st.composite
def workloads(draw: st.DrawFn) -> list[Request]:
    return [
        request(f"r{i}", draw(prompts), draw(st.integers(1, 18)), n=draw(st.sampled_from([1, 1, 1, 2, 3])), seed=i)
        for i in range(draw(st.integers(1, 7)))
    ]


@settings(max_examples=150 * SOAK, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    workload=workloads(), data=st.data(), block_size=st.sampled_from([1, 2, 4, 16]), window=st.sampled_from([None, 3, 9]),
    budget=st.integers(1, 40), seats=st.integers(1, 5), spare=st.integers(0, 12), overlap=st.booleans(),
    order=st.sampled_from([fcfs, priority]),
)  # fmt: skip
def test_output_does_not_depend_on_how_it_was_scheduled(
    workload: list[Request], data: st.DataObject, block_size: int, window: int | None, budget: int, seats: int, spare: int,
    overlap: bool, order: Any,
) -> None:  # fmt: skip
    alone: dict[tuple[str, int], list[int]] = {}
    for r in workload:
        for index in range(r.params.n):  # each sample by itself, in one chunk, with blocks to spare
            engine = make_engine(window=window, budget=MAX_LEN, seats=r.params.n, spare_blocks=500)
            alone[r.request_id, index] = run(engine, [r])[r.request_id, index]
    arrivals = [data.draw(st.integers(0, 12), label="arrival") for _ in workload]
    engine = make_engine(
        overlap=overlap, block_size=block_size, window=window, budget=budget, seats=seats, spare_blocks=spare, order=order
    )
    assert run(engine, workload, arrivals) == alone


@pytest.mark.parametrize("overlap", [False, True])
def test_tight_memory_preempts_and_changes_nothing(overlap: bool) -> None:
    workload = [request(f"r{i}", [i] * 20, 20, seed=i) for i in range(4)]
    roomy, tight = make_engine(spare_blocks=500), make_engine(spare_blocks=2, overlap=overlap)
    assert run(tight, workload) == run(roomy, workload)
    assert tight.snapshot().num_preemptions > 0
    assert roomy.snapshot().num_preemptions == 0


def test_a_step_in_flight_delays_preemption_until_it_has_ended() -> None:
    engine = make_engine(block_size=4, budget=64)  # 12 blocks
    engine.add(request("roomy", [1] * 22, 20))
    engine.add(request("at the end of its block", [2] * 24, 20, seed=1))
    steps = [engine.submit(engine.schedule(in_flight=False) or pytest.fail("nothing to run"))]
    plan = engine.schedule(in_flight=True)
    assert plan is not None
    assert len(plan.seq_ids) == 1, "the other one finds no block"
    steps.append(engine.submit(plan))
    assert engine.schedule(in_flight=True) is None, "somebody waits for a block: the pipeline must run dry first"
    for step in steps:
        assert step is not None
        engine.finish_step(step)
    assert engine.schedule(in_flight=False) is not None
    assert engine.snapshot().num_preemptions == 1


def test_samples_of_a_request_share_the_blocks_of_its_prompt() -> None:
    shared, alone = (make_engine(budget=256, seats=8, spare_blocks=99) for _ in range(2))
    shared.add(request("r", list(range(32)), n=4))
    for i in range(4):
        alone.add(request(f"r{i}", list(range(32))))
    shared.step(), alone.step()
    assert alone.kv.num_used == 4 * 8
    # Seven whole blocks are shared; the last prompt token is computed by each for its logits.
    assert shared.kv.num_used == 8 + 3


def test_priority_order_overtakes_and_preempts() -> None:
    engine = make_engine(order=priority, seats=1, spare_blocks=50)
    engine.add(request("late", [1] * 4, 4, level=5))
    engine.add(request("urgent", [2] * 4, 4, level=-5))
    done = []
    while engine.has_work:
        done += [o.request_id for o in engine.step() if o.finish_reason]
    assert done == ["urgent", "late"]


def test_a_full_queue_refuses_and_queues_nothing() -> None:
    engine = make_engine(max_num_waiting=3)
    engine.add(request("a", [1], n=2))
    with pytest.raises(Overloaded, match="waiting"):
        engine.add(request("b", [1], n=2))
    assert set(run(engine, [])) == {("a", 0), ("a", 1)}


@pytest.mark.parametrize("overlap", [False, True])
def test_a_failing_step_fails_its_requests_and_no_others(overlap: bool) -> None:
    workload = [request(f"r{i}", [i] * 10, 12, n=1 + i % 2, seed=i) for i in range(4)]
    later = request("later", [9, 9, 9], 10)
    expected = run(make_engine(spare_blocks=99), [later])
    engine = make_engine(overlap=overlap, spare_blocks=99, seats=8, faults=Faults(raise_at=3))
    for r in workload:
        engine.add(r)
    errors, tokens = {}, {}
    while engine.has_work:
        for o in (outputs := engine.step()):
            if o.error:
                errors[o.request_id, o.sample_index] = o.error
        if len(errors) == 6 and later is not None:
            engine.add(later)
            later = None
        collect([o for o in outputs if o.request_id == "later"], tokens)
    assert len(errors) == 6
    assert all(code == "step_failed" and "simulated fault" in message for code, message in errors.values())
    assert tokens == expected
    assert engine.kv.num_used == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_nobody_starves_while_others_keep_coming(overlap: bool) -> None:
    """Tight memory and an endless stream of newcomers: the old ones still end, in a bounded number of steps."""
    engine = make_engine(overlap=overlap, spare_blocks=3, seats=4)
    old = [request(f"old{i}", [i] * 20, 25, seed=i) for i in range(3)]
    for r in old:
        engine.add(r)
    ended: set[str] = set()
    for step in range(400):
        engine.add(request(f"new{step}", [step % 60] * 9, 6, seed=step))
        ended |= {o.request_id for o in engine.step() if o.finish_reason}
        if {r.request_id for r in old} <= ended:
            return
    raise AssertionError(f"still waiting: {[r.request_id for r in old if r.request_id not in ended]}")


class EngineMachine(RuleBasedStateMachine):
    """Random adds, aborts and steps; after each, the blocks must add up."""

    @initialize(
        overlap=st.booleans(), block_size=st.sampled_from([1, 4, 16]), window=st.sampled_from([None, 5]),
        budget=st.integers(1, 32), seats=st.integers(1, 4), spare=st.integers(0, 10),
    )  # fmt: skip
    def build(self, overlap: bool, block_size: int, window: int | None, budget: int, seats: int, spare: int) -> None:
        self.budget, self.seats = budget, seats
        self.engine = make_engine(
            overlap=overlap, block_size=block_size, window=window, budget=budget, seats=seats, spare_blocks=spare
        )
        self.names: list[str] = []
        self.ended: set[tuple[str, int]] = set()
        self.expected: set[tuple[str, int]] = set()
        submit = self.engine.worker.submit

        def checked(plan: Any) -> Any:
            assert 0 < sum(plan.num_tokens) <= budget
            assert len(plan.seq_ids) == len(set(plan.seq_ids)) <= seats
            restarted = set(plan.released) & {s.seq_id for s in plan.starts}
            assert not restarted or len(plan.starts) == len(plan.seq_ids), "preempted and restarted in one step: thrashing"
            return submit(plan)

        self.engine.worker.submit = checked  # type: ignore[method-assign]

    @rule(prompt=prompts, max_tokens=st.integers(1, 20), n=st.integers(1, 3))
    def add(self, prompt: list[int], max_tokens: int, n: int) -> None:
        name = f"r{len(self.names)}"
        self.names.append(name)
        self.expected |= {(name, i) for i in range(n)}
        self.engine.add(request(name, prompt, max_tokens, n=n))

    @rule(which=st.integers(0, 30), sample=st.sampled_from([None, 0, 1]))
    def abort(self, which: int, sample: int | None) -> None:
        self.engine.abort(f"r{which}", sample)  # of a request that runs, has ended, or never was

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            for output in self.engine.step():
                assert output.error is None, output.error  # a check in the worker's place shows here
                if output.finish_reason:
                    key = (output.request_id, output.sample_index)
                    assert key not in self.ended, "a sequence ended twice"
                    self.ended.add(key)

    @invariant()
    def blocks_add_up(self) -> None:
        if not hasattr(self, "engine"):
            return
        kv = self.engine.kv
        assert isinstance(kv, PagedKVCache)
        for group, pool in enumerate(kv.pools):
            held: dict[int, int] = {}
            for tables in kv.tables.values():
                for block in tables[group]:
                    if block:
                        held[block] = held.get(block, 0) + 1
            assert held == {b: n for b, n in enumerate(pool.references) if n}, "references are not what is held"
            assert len(set(pool.free_ids)) == len(pool.free_ids), "a block was freed twice"
            assert set(pool.free_ids) | set(held) == set(range(1, len(pool.references))), "a block was leaked"
            assert not set(pool.free_ids) & set(held), "a free block is in use"

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(20_000):
            if not self.engine.has_work:
                break
            self.step(1)
        assert self.ended == self.expected, "somebody starves"
        assert self.engine.kv.num_used == 0, "blocks are left over"


# 100 × 40 operations; `make soak` runs a million.
EngineMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("DOVETAIL_SOAK_MACHINES", "100")), stateful_step_count=40, deadline=None
)
TestEngineMachine = EngineMachine.TestCase
