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
prompts = st.builds(lambda head, cut, tail: (head[:cut] + tail)[:30], prefixes, st.integers(1, 24), st.lists(st.integers(0, 9)))
alike = st.builds(Asked, prompts, max_tokens=st.integers(1, 18), n=st.sampled_from([1, 1, 1, 2]), level=st.just(0), arrival=st.integers(0, 30))
workloads = st.lists(alike, min_size=1, max_size=8)

def new_scheduler(setup: Setup, kv: Any) -> TokenBudgetScheduler:
    ...

def new_paged(setup: Setup) -> PagedKVCache:
    ...

class PrefixCacheContract(Contract):
    socket = 'prefix_cache'

    @property
    def parts(self) -> Parts:
        ...

    def new(self, groups: list[KVGroup], num_blocks: list[int]) -> PrefixCache:
        ...

    def new_kv(self, setup: Setup) -> ReusingKVCache:
        ...

    @common_causes('a block forgotten by evict and still found', 'keep answered for a block that was never inserted', 'the same block in the eviction order twice', 'claim without taking the block out of the eviction order', 'tokens hashed in fewer bytes than they have', 'the books of one KV group used for another')
    def test_the_books_stay_right(self) -> None:
        ...

    @common_causes('a block in use named by evict', 'more or fewer blocks evicted than asked for')
    def test_an_engine_whatever_happens(self) -> None:
        ...

    @common_causes("a hash of a block's own tokens, without those before it", 'blocks inserted before they were computed')
    def test_reuse_changes_no_output(self) -> None:
        ...

    @common_causes('blocks inserted and never found', 'the chain of a sequence not continued after a hit')
    def test_what_was_computed_is_found(self) -> None:
        ...

    @common_causes('adapter_id or cache_salt left out of the key', "only the first block's key depends on them")
    def test_nothing_is_shared_across_salts_and_adapters(self) -> None:
        ...

    @common_causes('state kept by the class or the module instead of the object')
    def test_two_engines_do_not_meet(self) -> None:
        ...

    @common_causes('reset that leaves the eviction order as it was', 'blocks in use kept after a reset')
    def test_reset_forgets_everything(self) -> None:
        ...
