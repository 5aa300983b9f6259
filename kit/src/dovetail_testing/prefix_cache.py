"""The contract of the prefix-cache extension point, as tests. A plugin's test is a subclass:

class TestMyPrefixCache(PrefixCacheContract):
    provider = PROVIDER
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from hypothesis import strategies as st

from dovetail.engine.kv_cache import PagedKVCache
from dovetail.engine.prefix_reuse import ReusingKVCache
from dovetail.engine.scheduler import TokenBudgetScheduler, fcfs
from dovetail.engine.tiered_cache import TieredKVCache
from dovetail.interfaces.prefix_cache import PrefixCache
from dovetail.plugin.provider import HOST_MEMORY
from dovetail.types import KVGroup, Request, SamplingParams, StepPlan
from dovetail_testing.contract import Contract, common_causes
from dovetail_testing.engines import (
    AlikeMachine,
    Asked,
    Parts,
    Setup,
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
    """Subclass, set `provider`, and pytest does the rest."""

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

    def new_tiered(self, setup: Setup) -> TieredKVCache:
        host = [setup.host_blocks] * len(setup.groups)
        cache: Any = self.new(setup.groups, setup.num_blocks, host)
        return TieredKVCache(setup.groups, setup.num_blocks, cache, host)

    @property
    def tiered(self) -> Parts:
        if HOST_MEMORY not in self.provider.options.model_fields:
            pytest.skip(f"{self.provider.name} has no option {HOST_MEMORY}")
        return Parts(self.new_tiered, new_scheduler)

    def new_kv(self, setup: Setup) -> ReusingKVCache:
        return ReusingKVCache(
            setup.groups, setup.num_blocks, self.new(setup.groups, setup.num_blocks)
        )

    @common_causes(
        "a block forgotten by evict and still found",
        "keep answered for a block that was never inserted",
        "the same block in the eviction order twice",
        "claim without taking the block out of the eviction order",
        "tokens hashed in fewer bytes than they have",
        "the books of one KV group used for another",
    )
    def test_the_books_stay_right(self) -> None:
        """Whatever comes: what is found is what was inserted and not forgotten since, with equal
        tokens, adapter and salt; what is evicted was kept and unused; and what is known is
        found."""
        self.run_machine(partial(IndexMachine, self.new), examples=120)

    @common_causes("a block in use named by evict", "more or fewer blocks evicted than asked for")
    def test_engine_invariants_hold(self) -> None:
        """Requests that begin alike come, run and are aborted at any moment: blocks are conserved
        and everyone ends."""
        self.run_machine(partial(AlikeMachine, self.parts), examples=40)

    @common_causes(
        "a host block in the order of the device's",
        "a block that was moved still found where it was",
    )
    def test_engine_invariants_hold_with_a_host_tier(self) -> None:
        """The same where blocks go to host memory and come back: of both tiers every block is free
        or kept."""
        self.run_machine(partial(AlikeMachine, self.tiered, has_host_tier=True), examples=60)

    @common_causes(
        "`promote` or `demote` pairs the blocks in another order",
        "the books of one tier used for the other",
    )
    def test_a_host_tier_changes_no_output(self) -> None:
        """A sequence says what it says without a prefix cache, whichever tier its blocks come from,
        and after failed steps."""

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
                assert not different, f"{different} differ from what they say without"
            assert isinstance(engine.kv, TieredKVCache)
            assert engine.kv.prefix_cache is not None, (
                "the prefix cache failed and was switched off"
            )

        self.run_examples(
            same_as_without,
            examples=80,
            setup=tiered_setups,
            workload=workloads_alike,
            fails_at=st.integers(1, 40),
        )

    @common_causes(
        "what is demoted is forgotten",
        "host blocks that were promoted stay in the host's order of eviction",
    )
    def test_what_the_host_has_room_for_is_found_again(self) -> None:
        """Four prompts that the device has no room for together are found whole, again and again,
        if the host has room."""
        engine = self.tiered.engine(Setup(block_size=4, budget=64, max_num_seqs=1, host_blocks=60))
        for _ in range(4):
            for i in range(4):
                run(engine, [request(f"r{i}", [i] * 40, 4, seed=i)])
        assert isinstance(engine.kv, TieredKVCache)
        found = engine.kv.num_hit_tokens
        known = 3 * 4 * 36
        assert found == known, (
            f"four prompts of 40 tokens came four times, and {found} tokens were found; {known} are"
            " known"
        )
        assert engine.kv.num_evicted["to_host"] > 0, "the device had room for all"
        assert not engine.kv.num_evicted["device_full"] + engine.kv.num_evicted["host_full"], (
            "blocks were forgotten"
        )

    @common_causes(
        "a hash of a block's own tokens, without those before it",
        "blocks inserted before they were computed",
    )
    def test_reuse_changes_no_output(self) -> None:
        """A sequence says what it says without a prefix cache, also when memory is tight."""

        def same_as_without(setup: Setup, workload: list[Asked]) -> None:
            requests = requests_of(workload)
            expected = alone(Parts(new_paged, new_scheduler), requests, setup.window)
            engine = self.parts.engine(setup)
            got = run(engine, requests, [a.arrival for a in workload])
            assert isinstance(engine.kv, ReusingKVCache)
            assert engine.kv.prefix_cache is not None, (
                "the prefix cache failed and was switched off"
            )
            different = [key for key in expected if got.get(key) != expected[key]]
            assert not different, f"{different} differ from what they say without"

        self.run_examples(same_as_without, examples=80, setup=setups, workload=workloads_alike)

    @common_causes(
        "what is expected found before it is computed", "an expectation that outlives its sequence"
    )
    def test_what_failed_is_never_found(self) -> None:
        """When a step fails, nothing of it is found: what others say, and what the same requests
        say next, is what they say without a prefix cache."""

        def same_as_without(setup: Setup, workload: list[Asked], fails_at: int) -> None:
            requests = requests_of(workload)
            expected = alone(Parts(new_paged, new_scheduler), requests, setup.window)
            faults = Faults(raise_at=fails_at)
            engine = self.parts.engine(setup, faults)
            got = run_with_failures(engine, requests, [a.arrival for a in workload])
            faults.raise_at = None
            again = run(engine, requests)
            assert isinstance(engine.kv, ReusingKVCache)
            assert engine.kv.prefix_cache is not None, (
                "the prefix cache failed and was switched off"
            )
            different = [
                key
                for key in expected
                if got.get(key, expected[key]) != expected[key] or again[key] != expected[key]
            ]
            assert not different, f"{different} differ from what they say without"

        self.run_examples(
            same_as_without,
            examples=60,
            setup=setups,
            workload=workloads_alike,
            fails_at=st.integers(1, 12),
        )

    @pytest.mark.parametrize("overlap", [False, True])
    @common_causes(
        "`expect` ignored", "`expected_from` asked for a block answers for the one after it"
    )
    def test_what_comes_together_is_computed_once(self, overlap: bool) -> None:
        """Requests that arrive together and begin alike wait for the first of them, and compute
        what is their own."""
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
            f"8 prompts of 30 tokens, 28 of them the same, took {total} computed tokens, not 30 +"
            " 7 × 2"
        )

    @common_causes(
        "blocks inserted and never found", "the chain of a sequence not continued after a hit"
    )
    def test_what_was_computed_is_found(self) -> None:
        """With memory to spare, a prompt that comes again is found whole, but for the block of its
        last token."""
        engine = self.parts.engine(Setup(spare_blocks=200, block_size=4, budget=64))
        for i in range(3):
            run(engine, [request(f"r{i}", list(range(1, 30)), 4, seed=i)])
        assert isinstance(engine.kv, ReusingKVCache)
        found = engine.kv.num_hit_tokens
        assert found == 2 * 28, (
            f"a prompt of 29 tokens came three times, and {found} tokens were found; 2 × 28 are"
            " known"
        )

    @common_causes(
        "adapter_id or cache_salt left out of the key", "only the first block's key depends on them"
    )
    def test_nothing_is_shared_across_salts_and_adapters(self) -> None:
        """Requests of different `cache_salt` or `adapter_id` share nothing, not even with those
        that have none."""
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
        assert isinstance(engine.kv, ReusingKVCache)
        assert engine.kv.num_hit_tokens == 0, (
            f"{engine.kv.num_hit_tokens} tokens were found across salts or adapters"
        )

    @common_causes("state kept by the class or the module instead of the object")
    def test_two_engines_do_not_meet(self) -> None:
        """Two objects know nothing of each other's blocks."""
        for i in range(2):
            engine = self.parts.engine(Setup(spare_blocks=200, block_size=4, budget=64))
            run(engine, [request(f"r{i}", list(range(1, 30)), 4)])
            assert isinstance(engine.kv, ReusingKVCache)
            assert engine.kv.num_hit_tokens == 0, (
                f"{engine.kv.num_hit_tokens} tokens were found that another engine computed"
            )

    @common_causes(
        "reset that leaves the eviction order as it was", "blocks in use kept after a reset"
    )
    def test_reset_forgets_everything(self) -> None:
        """After `reset` nothing is found, and all blocks come back, also those in use at that
        moment."""
        engine = self.parts.engine(Setup(spare_blocks=200, block_size=4, budget=64))
        assert isinstance(engine.kv, ReusingKVCache)
        run(engine, [request("before", list(range(1, 30)), 4)])
        engine.add(request("during", list(range(1, 30)), 8))
        for _ in range(3):
            engine.step()
        hits = engine.kv.num_hit_tokens
        engine.kv.reset_prefix_cache()
        kept = [len(k) for k in engine.kv.evictable]
        assert not any(kept), f"{kept} blocks are kept after a reset"
        run(engine, [])
        run(engine, [request("after", list(range(1, 30)), 1)])
        stale = engine.kv.num_hit_tokens - hits
        assert stale == 0, f"{stale} tokens were found that were computed before the reset"
        engine.watch.sequences()
        assert engine.kv.prefix_cache is not None, "the prefix cache failed and was switched off"
