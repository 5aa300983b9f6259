"""The contract of the prefix-cache socket, as tests. A plugin's test is a subclass:

    class TestMyPrefixCache(PrefixCacheContract):
        provider = PROVIDER
"""

from __future__ import annotations

from functools import partial
from typing import Any

from hypothesis import strategies as st

from dovetail.interfaces.prefix_cache import PrefixCache
from dovetail.kv_cache import PagedKVCache
from dovetail.prefix_reuse import ReusingKVCache
from dovetail.scheduler import TokenBudgetScheduler, fcfs
from dovetail.testing.contract import Contract, common_causes
from dovetail.testing.engines import Asked, EngineMachine, Parts, Setup, alone, request, requests_of, run, setups
from dovetail.testing.prefix_cache_machine import IndexMachine
from dovetail.types import KVGroup, Request, SamplingParams

prefixes = st.sampled_from([[1, 2, 3, 4, 5, 6, 7, 8] * 3, [1, 2, 3, 4] * 4, [9] * 20, [1, 2, 3, 4, 9, 9, 9, 9, 9], [5]])
"""Beginnings that many requests share."""
prompts = st.builds(
    lambda head, cut, tail: (head[:cut] + tail)[:30], prefixes, st.integers(1, 24), st.lists(st.integers(0, 9))
)
alike = st.builds(
    Asked, prompts, max_tokens=st.integers(1, 18), n=st.sampled_from([1, 1, 1, 2]), level=st.just(0),
    arrival=st.integers(0, 30),
)  # fmt: skip
workloads = st.lists(alike, min_size=1, max_size=8)


def new_scheduler(setup: Setup, kv: Any) -> TokenBudgetScheduler:
    return TokenBudgetScheduler(kv, fcfs, max_num_seqs=setup.seats, max_num_batched_tokens=setup.budget)


def new_paged(setup: Setup) -> PagedKVCache:
    return PagedKVCache(setup.groups, setup.num_blocks)


class PrefixCacheContract(Contract):
    """Subclass, set `provider`, and pytest does the rest."""

    socket = "prefix_cache"

    @property
    def parts(self) -> Parts:
        return Parts(self.new_kv, new_scheduler)

    def new(self, groups: list[KVGroup], num_blocks: list[int]) -> PrefixCache:
        cache: PrefixCache = self.build(self.build_context(kv_groups=tuple(groups), num_blocks=tuple(num_blocks)))
        return cache

    def new_kv(self, setup: Setup) -> ReusingKVCache:
        return ReusingKVCache(setup.groups, setup.num_blocks, self.new(setup.groups, setup.num_blocks))

    @common_causes(
        "a block forgotten by evict and still found", "keep answered for a block that was never inserted",
        "the same block in the eviction order twice", "claim without taking the block out of the eviction order",
        "tokens hashed in fewer bytes than they have", "the books of one KV group used for another",
    )  # fmt: skip
    def test_the_books_stay_right(self) -> None:
        """Whatever comes: what is found is what was inserted and not forgotten since, with equal tokens, adapter and salt; what
        is evicted was kept and unused; and what is known is found."""
        self.run_machine(partial(IndexMachine, self.new), examples=120)

    @common_causes("a block in use named by evict", "more or fewer blocks evicted than asked for")
    def test_an_engine_whatever_happens(self) -> None:
        """Requests that begin alike come, run and are aborted at any moment: blocks are conserved and everyone ends."""
        self.run_machine(partial(EngineMachine, self.parts), examples=40)

    @common_causes("a hash of a block's own tokens, without those before it", "blocks inserted before they were computed")
    def test_reuse_changes_no_output(self) -> None:
        """A sequence says what it says without a prefix cache, also when memory is tight."""

        def same_as_without(setup: Setup, workload: list[Asked]) -> None:
            requests = requests_of(workload)
            expected = alone(Parts(new_paged, new_scheduler), requests, setup.window)
            engine = self.parts.engine(setup)
            got = run(engine, requests, [a.arrival for a in workload])
            assert isinstance(engine.kv, ReusingKVCache)
            assert engine.kv.prefix_cache is not None, "the prefix cache failed and was switched off"
            different = [key for key in expected if got.get(key) != expected[key]]
            assert not different, f"{different} differ from what they say without"

        self.run_examples(same_as_without, examples=80, setup=setups, workload=workloads)

    @common_causes("blocks inserted and never found", "the chain of a sequence not continued after a hit")
    def test_what_was_computed_is_found(self) -> None:
        """With memory to spare, a prompt that comes again is found whole, but for the block of its last token."""
        engine = self.parts.engine(Setup(spare_blocks=200, block_size=4, budget=64))
        for i in range(3):
            run(engine, [request(f"r{i}", list(range(1, 30)), 4, seed=i)])
        assert isinstance(engine.kv, ReusingKVCache)
        found = engine.kv.num_hit_tokens
        assert found == 2 * 28, f"a prompt of 29 tokens came three times, and {found} tokens were found; 2 × 28 are known"

    @common_causes("adapter_id or cache_salt left out of the key", "only the first block's key depends on them")
    def test_nothing_is_shared_across_salts_and_adapters(self) -> None:
        """Requests of different `cache_salt` or `adapter_id` share nothing, not even with those that have none."""
        engine = self.parts.engine(Setup(spare_blocks=200, block_size=4, budget=64))
        kinds = [(None, None), (None, "a"), (None, "b"), ("a", None), ("b", None), ("a", "b"), ("", ""), (None, "None")]
        for i, (adapter, salt) in enumerate(kinds):
            params = SamplingParams(max_tokens=2)
            run(engine, [Request(f"r{i}", list(range(1, 20)), params, 2, i, [], adapter_id=adapter, cache_salt=salt)])
        assert isinstance(engine.kv, ReusingKVCache)
        assert engine.kv.num_hit_tokens == 0, f"{engine.kv.num_hit_tokens} tokens were found across salts or adapters"

    @common_causes("state kept by the class or the module instead of the object")
    def test_two_engines_do_not_meet(self) -> None:
        """Two objects know nothing of each other's blocks."""
        for i in range(2):
            engine = self.parts.engine(Setup(spare_blocks=200, block_size=4, budget=64))
            run(engine, [request(f"r{i}", list(range(1, 30)), 4)])
            assert isinstance(engine.kv, ReusingKVCache)
            assert engine.kv.num_hit_tokens == 0, f"{engine.kv.num_hit_tokens} tokens were found that another engine computed"

    @common_causes("reset that leaves the eviction order as it was", "blocks in use kept after a reset")
    def test_reset_forgets_everything(self) -> None:
        """After `reset` nothing is found, and all blocks come back, also those in use at that moment."""
        engine = self.parts.engine(Setup(spare_blocks=200, block_size=4, budget=64))
        assert isinstance(engine.kv, ReusingKVCache)
        run(engine, [request("before", list(range(1, 30)), 4)])
        engine.add(request("during", list(range(1, 30)), 8))
        for _ in range(3):
            engine.step()
        hits = engine.kv.num_hit_tokens
        engine.kv.reset_prefix_cache()
        kept = [len(k) for k in engine.kv.kept]
        assert not any(kept), f"{kept} blocks are kept after a reset"
        run(engine, [])
        run(engine, [request("after", list(range(1, 30)), 1)])
        stale = engine.kv.num_hit_tokens - hits
        assert stale == 0, f"{stale} tokens were found that were computed before the reset"
        engine.watch.sequences()
        assert engine.kv.prefix_cache is not None, "the prefix cache failed and was switched off"
