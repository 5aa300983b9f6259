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
from dovetail_testing.engines import AlikeMachine, Asked, Parts, Setup, WatchedEngine, alone, request, requests_of, run, run_with_failures, setups, workloads_alike
from dovetail_testing.prefix_cache_machine import IndexMachine
from dovetail_testing.simulated import Faults

def new_scheduler(setup: Setup, kv: Any) -> TokenBudgetScheduler:
    ...

def new_paged(setup: Setup) -> PagedKVCache:
    ...

def assert_not_switched_off(engine: WatchedEngine) -> None:
    ...
tiered_setups = st.builds(Setup, overlap=st.booleans(), block_size=st.sampled_from([1, 2, 4]), window=st.sampled_from([None, None, 3, 9]), budget=st.integers(1, 40), max_num_seqs=st.integers(1, 4), spare_blocks=st.integers(0, 4), host_blocks=st.integers(1, 40))

class PrefixCacheContract(Contract):
    extension_point = 'prefix_cache'

    @property
    def parts(self) -> Parts:
        ...

    def new(self, groups: list[KVGroup], num_blocks: list[int], num_host_blocks: list[int] | None=None) -> PrefixCache:
        ...

    def new_tiered(self, setup: Setup) -> PagedKVCache:
        ...

    @property
    def tiered(self) -> Parts:
        ...

    def new_kv(self, setup: Setup) -> PagedKVCache:
        ...

    @common_causes('a block that evict removed is still found', 'keep returns True for a block that was never inserted', 'the same block is in the eviction order twice', 'claim does not remove the block from the eviction order', 'tokens are hashed in fewer bytes than they have', 'the state of one KV group is used for another')
    def test_bookkeeping_is_consistent(self) -> None:
        ...

    @common_causes('evict returns a block in use', 'evict returns more or fewer blocks than requested')
    def test_engine_invariants_hold(self) -> None:
        ...

    @common_causes('a host block is in the eviction order of the device', 'a block that was moved is still found in its old place')
    def test_engine_invariants_hold_with_a_host_tier(self) -> None:
        ...

    @common_causes('`promote` or `demote` pairs the blocks in a different order', 'the state of one tier is used for the other')
    def test_a_host_tier_changes_no_output(self) -> None:
        ...

    @common_causes('demoted blocks are forgotten', 'promoted host blocks stay in the eviction order of the host')
    def test_what_the_host_has_room_for_is_found_again(self) -> None:
        ...

    @common_causes("a hash covers a block's own tokens without those before it", 'blocks are inserted before they are computed')
    def test_reuse_changes_no_output(self) -> None:
        ...

    @common_causes('an expected block is found before it is computed', 'an expectation outlives its sequence')
    def test_what_failed_is_never_found(self) -> None:
        ...

    @pytest.mark.parametrize('overlap', [False, True])
    @common_causes('`expect` is ignored', '`expected_from` returns the owner of the next block instead')
    def test_what_comes_together_is_computed_once(self, overlap: bool) -> None:
        ...

    @common_causes('inserted blocks are never found', 'the hash chain of a sequence is not continued after a hit')
    def test_what_was_computed_is_found(self) -> None:
        ...

    @common_causes('the key omits adapter_id or cache_salt', "only the first block's key depends on them")
    def test_nothing_is_shared_across_salts_and_adapters(self) -> None:
        ...

    @common_causes('state is stored in the class or the module instead of the object')
    def test_two_engines_do_not_meet(self) -> None:
        ...

    @common_causes('reset does not clear the eviction order', 'blocks in use stay cached after a reset')
    def test_reset_forgets_everything(self) -> None:
        ...
