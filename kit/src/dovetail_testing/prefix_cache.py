"""Test the contract of the prefix-cache extension point. A plugin's test is a subclass:

class TestMyPrefixCache(PrefixCacheContract):
    provider = PROVIDER
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from hypothesis import strategies as st

from dovetail.engine.kv_cache import PagedKVCache
from dovetail.engine.scheduler import TokenBudgetScheduler, fcfs
from dovetail.interfaces.prefix_cache import PrefixCache
from dovetail.plugin.provider import HOST_MEMORY
from dovetail.types import KVGroup, Request, SamplingParams, StepPlan
from dovetail_testing.contract import Contract, common_causes
from dovetail_testing.engines import (
    AlikeMachine,
    Asked,
    Parts,
    Setup,
    WatchedEngine,
    alone,
    request,
    requests_of,
    run,
    run_with_failures,
    setups,
    workloads_alike,
)
from dovetail_testing.prefix_cache_machine import IndexMachine
from dovetail_testing.simulated import Faults


def new_scheduler(setup: Setup, kv: Any) -> TokenBudgetScheduler:
    return TokenBudgetScheduler(
        kv, fcfs, max_num_seqs=setup.max_num_seqs, max_num_batched_tokens=setup.budget
    )


def new_paged(setup: Setup) -> PagedKVCache:
    return PagedKVCache(setup.groups, setup.num_blocks)


def assert_not_switched_off(engine: WatchedEngine) -> None:
    assert isinstance(engine.kv, PagedKVCache)
    assert engine.kv.prefix is not None
    assert engine.kv.prefix.cache is not None, (
        "the prefix cache raised an exception and was switched off"
    )


tiered_setups = st.builds(
    Setup,
    overlap=st.booleans(),
    block_size=st.sampled_from([1, 2, 4]),
    window=st.sampled_from([None, None, 3, 9]),
    budget=st.integers(1, 40),
    max_num_seqs=st.integers(1, 4),
    spare_blocks=st.integers(0, 4),
    host_blocks=st.integers(1, 40),
)


class PrefixCacheContract(Contract):
    """The contract of prefix caches. Subclass it and set `provider`."""

    extension_point = "prefix_cache"

    @property
    def parts(self) -> Parts:
        return Parts(self.new_kv, new_scheduler)

    def new(
        self, groups: list[KVGroup], num_blocks: list[int], num_host_blocks: list[int] | None = None
    ) -> PrefixCache:
        context = self.build_context(
            kv_groups=tuple(groups),
            num_blocks=tuple(num_blocks),
            num_host_blocks=tuple(num_host_blocks or ()),
        )
        cache: PrefixCache = self.build(context)
        return cache

    def new_tiered(self, setup: Setup) -> PagedKVCache:
        host = [setup.host_blocks] * len(setup.groups)
        cache: Any = self.new(setup.groups, setup.num_blocks, host)
        return PagedKVCache(setup.groups, setup.num_blocks, cache, host)

    @property
    def tiered(self) -> Parts:
        if HOST_MEMORY not in self.provider.options.model_fields:
            pytest.skip(f"{self.provider.name} has no option {HOST_MEMORY}")
        return Parts(self.new_tiered, new_scheduler)

    def new_kv(self, setup: Setup) -> PagedKVCache:
        return PagedKVCache(
            setup.groups, setup.num_blocks, self.new(setup.groups, setup.num_blocks)
        )

    @common_causes(
        "a block that evict removed is still found",
        "keep returns True for a block that was never inserted",
        "the same block is in the eviction order twice",
        "claim does not remove the block from the eviction order",
        "tokens are hashed in fewer bytes than they have",
        "the state of one KV group is used for another",
    )
    def test_bookkeeping_is_consistent(self) -> None:
        """In any sequence of operations: what is found was inserted and not removed since, with
        equal tokens, adapter and salt; what is evicted was cached and unreferenced; and what is
        cached is found."""
        self.run_machine(partial(IndexMachine, self.new), examples=120)

    @common_causes(
        "evict returns a block in use", "evict returns more or fewer blocks than requested"
    )
    def test_engine_invariants_hold(self) -> None:
        """Requests with common prefixes are added, run and aborted at any time: no block is lost,
        and all requests end."""
        self.run_machine(partial(AlikeMachine, self.parts), examples=40)

    @common_causes(
        "a host block is in the eviction order of the device",
        "a block that was moved is still found in its old place",
    )
    def test_engine_invariants_hold_with_a_host_tier(self) -> None:
        """The same holds if blocks move to host memory and back: in both tiers every block is free
        or cached."""
        self.run_machine(partial(AlikeMachine, self.tiered, has_host_tier=True), examples=60)

    @common_causes(
        "`promote` or `demote` pairs the blocks in a different order",
        "the state of one tier is used for the other",
    )
    def test_a_host_tier_changes_no_output(self) -> None:
        """The output of a sequence is the same as without a prefix cache, from whichever tier its
        blocks come, and also after failed steps."""

        def same_as_without(setup: Setup, workload: list[Asked], fails_at: int) -> None:
            requests = requests_of(workload)
            expected = alone(Parts(new_paged, new_scheduler), requests, setup.window)
            faults = Faults(raise_at=fails_at)
            engine = self.tiered.engine(setup, faults)
            got = run_with_failures(engine, requests, [a.arrival for a in workload])
            faults.raise_at = None
            for _ in range(2):
                again = run(engine, requests)
                different = [
                    k
                    for k in expected
                    if got.get(k, expected[k]) != expected[k] or again[k] != expected[k]
                ]
                assert not different, (
                    f"the outputs of {different} differ from those without a prefix cache"
                )
            assert_not_switched_off(engine)

        self.run_examples(
            same_as_without,
            examples=80,
            setup=tiered_setups,
            workload=workloads_alike,
            fails_at=st.integers(1, 40),
        )

    @common_causes(
        "demoted blocks are forgotten",
        "promoted host blocks stay in the eviction order of the host",
    )
    def test_what_the_host_has_room_for_is_found_again(self) -> None:
        """Four prompts that do not fit on the device together are found whole each time if they fit
        into host memory."""
        engine = self.tiered.engine(Setup(block_size=4, budget=64, max_num_seqs=1, host_blocks=60))
        for _ in range(4):
            for i in range(4):
                run(engine, [request(f"r{i}", [i] * 40, 4, seed=i)])
        found = engine.snapshot().num_prefix_hit_tokens
        known = 3 * 4 * 36
        assert found == known, (
            f"four prompts of 40 tokens were sent four times, and {found} tokens were found instead"
            f" of {known}"
        )
        evicted = engine.snapshot().num_prefix_evicted_blocks
        assert evicted["to_host"] > 0, "no block moved to the host"
        assert not evicted["device_full"] + evicted["host_full"], (
            "blocks were evicted from the cache"
        )

    @common_causes(
        "a hash covers a block's own tokens without those before it",
        "blocks are inserted before they are computed",
    )
    def test_reuse_changes_no_output(self) -> None:
        """The output of a sequence is the same as without a prefix cache, even if memory is
        scarce."""

        def same_as_without(setup: Setup, workload: list[Asked]) -> None:
            requests = requests_of(workload)
            expected = alone(Parts(new_paged, new_scheduler), requests, setup.window)
            engine = self.parts.engine(setup)
            got = run(engine, requests, [a.arrival for a in workload])
            assert_not_switched_off(engine)
            different = [key for key in expected if got.get(key) != expected[key]]
            assert not different, (
                f"the outputs of {different} differ from those without a prefix cache"
            )

        self.run_examples(same_as_without, examples=80, setup=setups, workload=workloads_alike)

    @common_causes(
        "an expected block is found before it is computed",
        "an expectation outlives its sequence",
    )
    def test_what_failed_is_never_found(self) -> None:
        """If a step fails, nothing of it is found: the outputs of other requests, and of the same
        requests when they are repeated, are those without a prefix cache."""

        def same_as_without(setup: Setup, workload: list[Asked], fails_at: int) -> None:
            requests = requests_of(workload)
            expected = alone(Parts(new_paged, new_scheduler), requests, setup.window)
            faults = Faults(raise_at=fails_at)
            engine = self.parts.engine(setup, faults)
            got = run_with_failures(engine, requests, [a.arrival for a in workload])
            faults.raise_at = None
            again = run(engine, requests)
            assert_not_switched_off(engine)
            different = [
                key
                for key in expected
                if got.get(key, expected[key]) != expected[key] or again[key] != expected[key]
            ]
            assert not different, (
                f"the outputs of {different} differ from those without a prefix cache"
            )

        self.run_examples(
            same_as_without,
            examples=60,
            setup=setups,
            workload=workloads_alike,
            fails_at=st.integers(1, 12),
        )

    @pytest.mark.parametrize("overlap", [False, True])
    @common_causes(
        "`expect` is ignored", "`expected_from` returns the owner of the next block instead"
    )
    def test_what_comes_together_is_computed_once(self, overlap: bool) -> None:
        """Requests with a common prefix that arrive together wait for the first of them, and
        compute only their own tokens."""
        engine = self.parts.engine(Setup(overlap, spare_blocks=400, budget=48, max_num_seqs=8))
        num_tokens: list[int] = []
        watch = engine.watch.plan

        def watched(plan: StepPlan) -> None:
            watch(plan)
            num_tokens.extend(
                n for n, first in zip(plan.num_tokens, plan.num_computed, strict=True) if first < 30
            )

        engine.watch.plan = watched  # type: ignore[method-assign]
        run(engine, [request(f"r{i}", [*range(1, 29), 40 + i, i], 4, seed=i) for i in range(8)])
        total = sum(num_tokens)
        assert total == 30 + 7 * 2, (
            f"8 prompts of 30 tokens with a common prefix of 28 took {total} computed tokens, not"
            " 30 + 7 × 2"
        )

    @common_causes(
        "inserted blocks are never found",
        "the hash chain of a sequence is not continued after a hit",
    )
    def test_what_was_computed_is_found(self) -> None:
        """With enough memory, a repeated prompt is found whole, except for the block of its last
        token."""
        engine = self.parts.engine(Setup(spare_blocks=200, block_size=4, budget=64))
        for i in range(3):
            run(engine, [request(f"r{i}", list(range(1, 30)), 4, seed=i)])
        found = engine.snapshot().num_prefix_hit_tokens
        assert found == 2 * 28, (
            f"a prompt of 29 tokens was sent three times, and {found} tokens were found instead of"
            " 2 × 28"
        )

    @common_causes(
        "the key omits adapter_id or cache_salt", "only the first block's key depends on them"
    )
    def test_nothing_is_shared_across_salts_and_adapters(self) -> None:
        """Requests with different `cache_salt` or `adapter_id` share nothing; neither do requests
        with and without one."""
        engine = self.parts.engine(Setup(spare_blocks=200, block_size=4, budget=64))
        kinds = [
            (None, None),
            (None, "a"),
            (None, "b"),
            ("a", None),
            ("b", None),
            ("a", "b"),
            ("", ""),
            (None, "None"),
        ]
        for i, (adapter, salt) in enumerate(kinds):
            params = SamplingParams(max_tokens=2)
            run(
                engine,
                [
                    Request(
                        f"r{i}",
                        list(range(1, 20)),
                        params,
                        2,
                        i,
                        [],
                        adapter_id=adapter,
                        cache_salt=salt,
                    )
                ],
            )
        found = engine.snapshot().num_prefix_hit_tokens
        assert found == 0, f"{found} tokens were shared between salts or adapters"

    @common_causes("state is stored in the class or the module instead of the object")
    def test_two_engines_do_not_meet(self) -> None:
        """Two objects know nothing about each other's blocks."""
        for i in range(2):
            engine = self.parts.engine(Setup(spare_blocks=200, block_size=4, budget=64))
            run(engine, [request(f"r{i}", list(range(1, 30)), 4)])
            found = engine.snapshot().num_prefix_hit_tokens
            assert found == 0, f"{found} tokens were found that another engine computed"

    @common_causes(
        "reset does not clear the eviction order", "blocks in use stay cached after a reset"
    )
    def test_reset_forgets_everything(self) -> None:
        """After `reset` nothing is found, and all blocks become free, including those that were in
        use."""
        engine = self.parts.engine(Setup(spare_blocks=200, block_size=4, budget=64))
        assert isinstance(engine.kv, PagedKVCache)
        run(engine, [request("before", list(range(1, 30)), 4)])
        engine.add(request("during", list(range(1, 30)), 8))
        for _ in range(3):
            engine.step()
        hits = engine.snapshot().num_prefix_hit_tokens
        engine.kv.reset_prefix_cache()
        evictable = [len(pool.evictable) for pool in engine.kv.pools]
        assert not any(evictable), f"{evictable} blocks are still cached after a reset"
        run(engine, [])
        run(engine, [request("after", list(range(1, 30)), 1)])
        stale = engine.snapshot().num_prefix_hit_tokens - hits
        assert stale == 0, f"{stale} tokens computed before the reset were found"
        engine.watch.sequences()
        assert_not_switched_off(engine)
