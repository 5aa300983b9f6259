"""Test the contract of the scheduler extension point. A plugin's test is a subclass:

    class TestMyScheduler(SchedulerContract):
        provider = PROVIDER

The docstrings of its checks state the requirements.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from hypothesis import strategies as st

from dovetail.assembly.builtins import dovetail_kv_caches
from dovetail.engine.kv_cache import PagedKVCache
from dovetail.interfaces.kv_cache import KVCacheManager
from dovetail.interfaces.scheduler import Scheduler, SchedulerCapabilities
from dovetail.plugin.provider import SchedulerOptions
from dovetail.sequence import Sequence
from dovetail.types import Request
from dovetail_testing.contract import Contract, common_causes
from dovetail_testing.dictionary import DictionaryIndex
from dovetail_testing.engines import (
    AlikeMachine,
    Asked,
    EngineMachine,
    Outputs,
    Parts,
    Setup,
    WatchedEngine,
    alone,
    collect,
    request,
    requests_of,
    run,
    setups,
    workloads,
    workloads_alike,
)
from dovetail_testing.simulated import Faults

PAGED = dovetail_kv_caches()[0]
PATIENCE = 3000
"""Number of steps within which a sequence must end while others keep arriving, with blocks for
about four at a time."""


class SchedulerContract(Contract):
    """The contract of schedulers. Subclass it and set `provider`."""

    extension_point = "scheduler"

    @property
    def parts(self) -> Parts:
        return Parts(self.new_kv, self.new_scheduler)

    def new_kv(self, setup: Setup) -> KVCacheManager:
        context = self.build_context(
            kv_groups=tuple(setup.groups), num_blocks=tuple(setup.num_blocks)
        )
        return PAGED.build(context, PAGED.options())

    def new_scheduler(self, setup: Setup, kv: KVCacheManager) -> Scheduler:
        limits = {"max_num_seqs": setup.max_num_seqs, "max_num_batched_tokens": setup.budget}
        options = self.provider.options.model_validate({**self.options, **limits})
        context = self.build_context(
            kv_groups=tuple(setup.groups), num_blocks=tuple(setup.num_blocks), kv=kv
        )
        scheduler: Scheduler = self.provider.build(context, options)
        return scheduler

    def alone(self, requests: list[Request], window: int | None = None) -> Outputs:
        """Return the output of each sample by itself, in one chunk, with spare blocks."""
        return alone(self.parts, requests, window)

    @common_causes(
        "the options do not extend SchedulerOptions",
        "the capabilities are those of another extension point",
    )
    def test_declaration(self) -> None:
        """The options are a subclass of `SchedulerOptions`; the capabilities, if there are any, are
        `SchedulerCapabilities`."""
        assert issubclass(self.provider.options, SchedulerOptions), (
            "the options must be a subclass of SchedulerOptions"
        )
        can = self.provider.capabilities
        assert can is None or isinstance(can, SchedulerCapabilities), (
            f"the capabilities are a {type(can).__name__}"
        )

    @common_causes(
        "an early `continue` skips the accounting of tokens or sequences",
        "blocks are not freed, or freed twice, on abort",
        "a sequence is in neither list, or in both",
        "a sequence is preempted while a step is in flight",
    )
    def test_block_accounting_invariant_holds(self) -> None:
        """Requests are added, run and aborted at any time. Every plan respects the token budget,
        the sequence limit and what the worker knows; no block is lost; no sequence is preempted
        while a step is in flight; in the end all requests have ended."""
        self.run_machine(partial(EngineMachine, self.parts), examples=60)

    @common_causes(
        "num_computed_tokens is not reset on preemption",
        "blocks are shared before they are computed",
        "a row is planned as if tokens in flight were known",
    )
    def test_scheduling_changes_no_output(self) -> None:
        """A sequence has the same output as alone, however it is split into chunks, batched,
        preempted and resumed."""

        def same_as_alone(setup: Setup, workload: list[Asked]) -> None:
            requests = requests_of(workload)
            expected = self.alone(requests, setup.window)
            got = run(self.parts.engine(setup), requests, [a.arrival for a in workload])
            different = [key for key in expected if got.get(key) != expected[key]]
            assert not different, f"the outputs of {different} differ from those alone"

        self.run_examples(same_as_alone, examples=80, setup=setups, workload=workloads)

    @common_causes(
        "a sequence that must wait (`reuse` returned None) is started, or blocks those behind it",
        "blocks that were found are not freed again",
    )
    def test_shared_beginnings_change_no_output(self) -> None:
        """With a prefix cache, a sequence has the same output as alone, whichever sequences wait
        for each other's blocks; and all end, even if the one waited for is aborted."""

        def same_as_alone(setup: Setup, workload: list[Asked]) -> None:
            requests = requests_of(workload)
            expected = self.alone(requests, setup.window)
            got = run(
                Parts(new_reusing, self.new_scheduler).engine(setup),
                requests,
                [a.arrival for a in workload],
            )
            different = [key for key in expected if got.get(key) != expected[key]]
            assert not different, f"the outputs of {different} differ from those alone"

        self.run_examples(same_as_alone, examples=60, setup=setups, workload=workloads_alike)
        self.run_machine(partial(AlikeMachine, Parts(new_reusing, self.new_scheduler)), examples=30)

    @common_causes(
        "rows are not added with Sequence.add_row",
        "an old value of num_to_compute is used",
        "draft tokens are kept on preemption",
    )
    def test_drafts_change_no_output(self) -> None:
        """Sequences with draft tokens, some right and some wrong, have the same output as
        without."""

        def same_as_without(setup: Setup, workload: list[Asked]) -> None:
            requests = requests_of(workload)
            expected = self.alone(requests, setup.window)
            drafted = Parts(self.new_kv, self.new_scheduler, partial(Knowing, expected))
            got = run(drafted.engine(setup), requests, [a.arrival for a in workload])
            different = [key for key in expected if got.get(key) != expected[key]]
            assert not different, (
                f"the outputs of {different} differ from those without draft tokens"
            )

        self.run_examples(same_as_without, examples=60, setup=setups, workload=workloads)

    @pytest.mark.parametrize("overlap", [False, True])
    @common_causes(
        "a preempted sequence is resumed without its output so far",
        "its blocks are freed while its row is still in the plan",
    )
    def test_tight_memory_changes_no_output(self, overlap: bool) -> None:
        """If there are not enough blocks for all running sequences, some are preempted and resumed,
        with the same output."""
        workload = [request(f"r{i}", [i] * 20, 20, seed=i) for i in range(4)]
        tight = self.parts.engine(Setup(spare_blocks=2, overlap=overlap))
        assert run(tight, workload) == self.alone(workload)

    @pytest.mark.parametrize("overlap", [False, True])
    @pytest.mark.parametrize("size", [(9, 6), (2, 1), (20, 25)], ids=["middling", "tiny", "alike"])
    @common_causes(
        "new sequences overtake without bound: age those that wait",
        "the same sequence is preempted each time",
    )
    def test_nobody_starves_while_others_keep_coming(
        self, size: tuple[int, int], overlap: bool
    ) -> None:
        """Every sequence ends eventually, even if memory is scarce and there is always a new,
        possibly shorter one."""
        engine = self.parts.engine(Setup(overlap=overlap, spare_blocks=3))
        old = [request(f"old{i}", [i] * 20, 25, seed=i) for i in range(6)]
        for r in old:
            engine.add(r)
        waiting = {r.request_id for r in old}
        for step in range(PATIENCE):
            if len(engine.scheduler.waiting) < 20:
                engine.add(request(f"new{step}", [step % 60] * size[0], size[1], seed=step))
            for output in engine.step():
                assert output.error is None, output.error
                if output.finish_reason:
                    waiting.discard(output.request_id)
            if not waiting:
                return
        raise AssertionError(
            f"after {PATIENCE} steps {sorted(waiting)} have not ended; 20 other sequences were"
            " always waiting"
        )

    @pytest.mark.parametrize("overlap", [False, True])
    @common_causes(
        "`remove` searches only one list", "state of a failed step is used in the next one"
    )
    def test_a_failed_step_is_forgotten(self, overlap: bool) -> None:
        """If a step fails, its sequences and their blocks are removed, and later sequences are not
        affected."""
        requests, later = (
            [request(f"r{i}", [i] * 10, 12, n=1 + i % 2, seed=i) for i in range(4)],
            request("later", [9] * 3, 10),
        )
        engine = self.parts.engine(
            Setup(overlap=overlap, spare_blocks=99, max_num_seqs=8, budget=64), Faults(raise_at=3)
        )
        for r in requests:
            engine.add(r)
        while engine.has_work:
            engine.step()
            engine.watch.sequences()
        assert engine.kv.num_used == 0, (
            f"{engine.kv.num_used} blocks are still in use after a failed step"
        )
        assert run(engine, [later]) == self.alone([later])

    @pytest.mark.parametrize("index", range(6))
    @common_causes(
        "new sequences are put in front", "priorities are sorted the wrong way: lower runs first"
    )
    def test_declared_order(self, index: int) -> None:
        """Requests start in the declared order: by arrival, or by priority (lower first) and then
        by arrival."""
        can = self.provider.capabilities
        order = can.order if isinstance(can, SchedulerCapabilities) else None
        if order is None:
            pytest.skip(f"{self.provider.name} declares no order")

        def begins_in_order(max_num_seqs: int, levels: list[int]) -> None:
            started = first_rows(
                self.parts.engine(Setup(max_num_seqs=max_num_seqs, spare_blocks=50)), levels
            )
            key: dict[str, Any] = {"arrival": lambda i: i, "priority": lambda i: (levels[i], i)}
            assert started == sorted(started, key=key[order]), (
                f"requests with priorities {levels} started in the order {started}"
            )

        levels = st.lists(st.integers(-2, 2), min_size=2, max_size=8)
        self.run_examples(
            begins_in_order, examples=10, max_num_seqs=st.just(1 + index), levels=levels
        )


def new_reusing(setup: Setup) -> KVCacheManager:
    """Build a manager with the simplest prefix cache."""
    return PagedKVCache(
        setup.groups, setup.num_blocks, DictionaryIndex(setup.block_size, len(setup.groups))
    )


class Knowing:
    """A drafter that knows the expected output and is wrong at every third position."""

    def __init__(self, expected: Outputs) -> None:
        self.expected = expected

    def propose(self, seq: Sequence, max_tokens: int) -> list[int]:
        coming = self.expected[seq.request.request_id, seq.sample_index][seq.num_output_tokens :][
            :max_tokens
        ]
        first = len(seq.tokens)
        return [token if (first + i) % 3 else (token + 1) % 64 for i, token in enumerate(coming)]

    def forget(self, seq_id: int) -> None: ...


def first_rows(engine: WatchedEngine, levels: list[int]) -> list[int]:
    """Add requests with these priorities all at once; return their numbers in the order of their
    first rows."""
    for i, level in enumerate(levels):
        engine.add(request(f"r{i}", [i] * 5, 6, seed=i, level=level))
    of: dict[int, Sequence] = dict(engine.sequences)
    started: list[int] = []
    outputs: Outputs = {}
    submit = engine.watch.plan

    def watched(plan: Any) -> None:
        submit(plan)
        started.extend(int(of[s.seq_id].request.request_id[1:]) for s in plan.starts)

    engine.watch.plan = watched  # type: ignore[method-assign]
    while engine.has_work:
        collect(engine.step(), outputs)
    return list(dict.fromkeys(started))
