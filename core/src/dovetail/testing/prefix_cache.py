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
from dovetail.sequence import Sequence
from dovetail.testing.contract import Contract, common_causes
from dovetail.testing.engines import MAX_LEN, Asked, EngineMachine, Outputs, Parts, Setup, request, requests_of, run, setups
from dovetail.testing.machines import Machine, beginning, operation
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
    )  # fmt: skip
    def test_the_books_stay_right(self) -> None:
        """Whatever comes: what is found is what was inserted and not forgotten since, with equal tokens, adapter and salt; what
        is evicted was kept and unused; and what is known is found."""
        self.run_machine(partial(IndexMachine, self), examples=120)

    @common_causes("a block in use named by evict", "more or fewer blocks evicted than asked for")
    def test_an_engine_whatever_happens(self) -> None:
        """Requests that begin alike come, run and are aborted at any moment: blocks are conserved and everyone ends."""
        self.run_machine(partial(EngineMachine, self.parts), examples=40)

    @common_causes("a hash of a block's own tokens, without those before it", "blocks inserted before they were computed")
    def test_reuse_changes_no_output(self) -> None:
        """A sequence says what it says without a prefix cache, also when memory is tight."""

        def same_as_without(setup: Setup, workload: list[Asked]) -> None:
            requests = requests_of(workload)
            expected: Outputs = {}
            for r in requests:
                roomy = Setup(window=setup.window, budget=MAX_LEN, seats=r.params.n, spare_blocks=500)
                expected |= run(Parts(new_paged, new_scheduler).engine(roomy), [r])
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
        assert engine.kv.num_hit_tokens in (hits, hits + 28), "only what was computed after the reset may be found"
        engine.watch.sequences()
        assert engine.kv.prefix_cache is not None, "the prefix cache failed and was switched off"


class IndexMachine(Machine):
    """Plays the KV-cache manager of one group, and knows of every block what it holds."""

    size = 2
    group = 0

    def __init__(self, contract: PrefixCacheContract) -> None:
        super().__init__()
        self.contract = contract
        self.sequences: dict[int, Sequence] = {}
        self.tables: dict[int, list[int]] = {}
        self.holds: dict[int, tuple[Any, ...]] = {}
        """By block: what was inserted for it, until it is forgotten."""
        self.doubtful: set[tuple[Any, ...]] = set()
        """What two blocks held at a time: the cache may know either."""
        self.kept: set[int] = set()
        self.next_id = 0

    @beginning(num_blocks=st.integers(2, 20))
    def build(self, num_blocks: int) -> None:
        self.free = set(range(1, num_blocks))
        self.cache = self.contract.new([KVGroup([0], "full", self.size, 1)], [num_blocks])

    @operation(
        tokens=st.lists(st.integers(0, 1), min_size=2, max_size=10), salt=st.sampled_from([None, None, "s"]),
        adapter=st.sampled_from([None, None, "a"]),
    )  # fmt: skip
    def start(self, tokens: list[int], salt: str | None, adapter: str | None) -> None:
        r = Request(f"r{self.next_id}", tokens, SamplingParams(), 20, 0, [], adapter_id=adapter, cache_salt=salt)
        seq = Sequence(self.next_id, r, 0, list(tokens))
        self.next_id += 1
        limit = len(tokens) // self.size
        found = [ids[self.group] for ids in self.cache.match(seq, limit)]
        assert len(found) <= limit, f"{len(found)} blocks were found, and at most {limit} were asked for"
        for i, block in enumerate(found):
            held = self.holds.get(block)
            assert held == self._content(seq, i), f"block {block} was found for {self._content(seq, i)}, and holds {held}"
        if len(found) < limit:
            content = self._content(seq, len(found))
            alone = [b for b, held in self.holds.items() if held == content]
            assert len(alone) != 1 or content in self.doubtful, f"block {alone} holds {content}, and was not found"
        self.cache.claim(self.group, [b for b in found if b in self.kept])
        self.kept -= set(found)
        need = limit - len(found)
        self._make_room(need)
        if need > len(self.free):
            for block in reversed(found):
                self._drop(block)
            self.cache.forget(seq.seq_id)
            return
        new = [self.free.pop() for _ in range(need)]
        self.sequences[seq.seq_id], self.tables[seq.seq_id] = seq, found + new
        if new:
            self._insert(seq, len(found), new)

    def _make_room(self, need: int) -> None:
        count = min(need - len(self.free), len(self.kept))
        if count > 0:
            blocks = self.cache.evict(self.group, count)
            assert len(set(blocks)) == len(blocks) == count, f"{count} blocks were to be evicted, and {blocks} were"
            assert set(blocks) <= self.kept, f"blocks {sorted(set(blocks) - self.kept)} were evicted, which are not kept"
            self.kept -= set(blocks)
            self.free |= set(blocks)
            for block in blocks:
                del self.holds[block]

    def _insert(self, seq: Sequence, first: int, blocks: list[int]) -> None:
        for i, block in enumerate(blocks, first):
            content = self._content(seq, i)
            if content in self.holds.values():
                self.doubtful.add(content)
            self.holds[block] = content
        self.cache.insert(seq, first, [blocks])

    def _content(self, seq: Sequence, i: int) -> tuple[Any, ...]:
        return (seq.request.adapter_id, seq.request.cache_salt, *seq.tokens[: (i + 1) * self.size])

    @operation(which=st.integers(0, 9), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def grow(self, which: int, tokens: list[int]) -> None:
        if not self.sequences:
            return
        seq = list(self.sequences.values())[which % len(self.sequences)]
        seq.tokens += tokens
        table = self.tables[seq.seq_id]
        need = len(seq.tokens) // self.size - len(table)
        self._make_room(need)
        if 0 < need <= len(self.free):
            new = [self.free.pop() for _ in range(need)]
            first = len(table)
            table += new
            self._insert(seq, first, new)

    @operation(which=st.integers(0, 9))
    def end_one(self, which: int) -> None:
        if self.sequences:
            self._end(list(self.sequences)[which % len(self.sequences)])

    def _end(self, seq_id: int) -> None:
        for block in reversed(self.tables.pop(seq_id)):
            self._drop(block)
        del self.sequences[seq_id]
        self.cache.forget(seq_id)

    def _drop(self, block: int) -> None:
        if self._in_use(block):
            return
        if self.cache.keep(self.group, block):
            assert block in self.holds, f"block {block} is kept, and was never inserted or is forgotten"
            self.kept.add(block)
        else:
            self.holds.pop(block, None)
            self.free.add(block)

    def _in_use(self, block: int) -> bool:
        return any(block in table for table in self.tables.values())

    @operation()
    def reset(self) -> None:
        self.cache.reset()
        self.free |= self.kept
        self.kept.clear()
        self.holds.clear()
        self.doubtful.clear()
        for seq_id in list(self.sequences):  # its blocks are not known any more; it inserts no more, so end it
            table = self.tables.pop(seq_id)
            del self.sequences[seq_id]
            for block in table:
                if not self._in_use(block) and block not in self.free:
                    assert not self.cache.keep(self.group, block), f"block {block} is kept after a reset"
                    self.free.add(block)
            self.cache.forget(seq_id)

    def end(self) -> None:
        for seq_id in list(self.sequences):
            self._end(seq_id)
        self._make_room(len(self.free) + len(self.kept))
        assert not self.kept

