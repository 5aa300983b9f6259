"""What the core's own scheduler and loops promise beyond the contract, which is in
test_builtins_conform.py."""

from __future__ import annotations

from typing import Any

import pytest

from dovetail.engine.engine import Engine, OverlappedEngine
from dovetail.engine.kv_cache import PagedKVCache
from dovetail.engine.scheduler import TokenBudgetScheduler, fcfs, priority
from dovetail.errors import Overloaded
from dovetail_testing.clock import VirtualClock
from dovetail_testing.engines import Setup, collect, request, run
from dovetail_testing.simulated import Faults, SimulatedWorker


def make_engine(
    *, order: Any = fcfs, faults: Faults | None = None, max_num_waiting: int = 1000, **setup: Any
) -> Engine:
    limits = Setup(**setup)
    worker = SimulatedWorker(limits.groups, faults=faults)
    worker.allocate(limits.num_blocks)
    kv = PagedKVCache(limits.groups, limits.num_blocks)
    scheduler = TokenBudgetScheduler(
        kv, order, max_num_seqs=limits.max_num_seqs, max_num_batched_tokens=limits.budget
    )
    return (OverlappedEngine if limits.overlap else Engine)(
        scheduler, kv, worker, clock=VirtualClock(), max_num_waiting=max_num_waiting
    )


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
    assert engine.schedule(in_flight=True) is None, (
        "somebody waits for a block: the pipeline must run dry first"
    )
    for step in steps:
        assert step is not None
        engine.finish_step(step)
    assert engine.schedule(in_flight=False) is not None
    assert engine.snapshot().num_preemptions == 1


def test_samples_of_a_request_share_the_blocks_of_its_prompt() -> None:
    shared, alone = (make_engine(budget=256, max_num_seqs=8, spare_blocks=99) for _ in range(2))
    shared.add(request("r", list(range(32)), n=4))
    for i in range(4):
        alone.add(request(f"r{i}", list(range(32))))
    shared.step(), alone.step()
    assert alone.kv.num_used == 4 * 8
    # Seven whole blocks are shared; the last prompt token is computed by each for its logits.
    assert shared.kv.num_used == 8 + 3


def test_priority_order_overtakes_and_preempts() -> None:
    engine = make_engine(order=priority, max_num_seqs=1, spare_blocks=50)
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
    engine = make_engine(
        overlap=overlap, spare_blocks=99, max_num_seqs=8, faults=Faults(raise_at=3)
    )
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
    assert all(
        code == "step_failed" and "simulated fault" in message for code, message in errors.values()
    )
    assert tokens == expected
    assert engine.kv.num_used == 0
