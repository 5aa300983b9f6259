from __future__ import annotations
from dataclasses import dataclass, field
from functools import partial
import pytest
from hypothesis import strategies as st
from dovetail.assembly.builtins import dovetail_schedulers
from dovetail.interfaces.kv_cache import KVCacheManager
from dovetail.interfaces.scheduler import Scheduler
from dovetail.plugin.provider import KVCacheOptions, SchedulerOptions
from dovetail.types import KVGroup
from dovetail_testing.contract import Contract, common_causes
from dovetail_testing.dictionary import DictionaryIndex
from dovetail_testing.engines import Asked, EngineMachine, Parts, Setup, alone, request, requests_of, run, setups, workloads_alike
from dovetail_testing.machines import Machine, beginning, operation
FCFS = dovetail_schedulers()[0]
NULL_BLOCK = 0

class KVCacheContract(Contract):
    extension_point = 'kv_cache'

    def new(self, groups: list[KVGroup], num_blocks: list[int]) -> KVCacheManager:
        ...

    @property
    def parts(self) -> Parts:
        ...

    def new_scheduler(self, setup: Setup, kv: KVCacheManager) -> Scheduler:
        ...

    @common_causes('the options do not extend KVCacheOptions', 'num_total includes the null block')
    def test_declaration(self) -> None:
        ...

    @common_causes('a block with several holders is freed twice, or not at all', 'a partial block is shared', 'blocks of one group are allocated before another is found to have too few', '`free` frees trimmed blocks again')
    def test_blocks_are_conserved(self) -> None:
        ...

    @common_causes('an off-by-one in the number of free blocks', 'one block is reserved per sequence')
    def test_the_last_block_can_be_had(self) -> None:
        ...

    @pytest.mark.parametrize('overlap', [False, True])
    @common_causes('blocks are returned in a different order than in the table', 'a trimmed entry is removed instead of replaced by the null block')
    def test_an_engine_runs_on_it(self, overlap: bool) -> None:
        ...

    @common_causes('state of a sequence outlives `free`', 'a sequence that shares its prompt is aborted')
    def test_blocks_are_returned(self) -> None:
        ...

    @common_causes('`reuse` returns None without `may_wait`', 'blocks that were found are not referenced')
    def test_a_prefix_cache_changes_no_output(self) -> None:
        ...

@dataclass(frozen=True)
class Kind:
    block_size: int
    window: int | None = None

@dataclass
class Model:
    tables: dict[int, list[list[int]]] = field(default_factory=dict)
    num_tokens: dict[int, int] = field(default_factory=dict)
    num_computed: dict[int, int] = field(default_factory=dict)

    def held(self, group: int) -> set[int]:
        ...

class BlocksMachine(Machine):
    kv: KVCacheManager

    def __init__(self, contract: KVCacheContract) -> None:
        ...

    @beginning(kinds=st.lists(st.builds(Kind, st.sampled_from([1, 2, 4, 8]), st.none() | st.integers(1, 12)), min_size=1, max_size=3), num_blocks=st.integers(2, 24))
    def build(self, kinds: list[Kind], num_blocks: int) -> None:
        ...

    @operation(which=st.integers(0, 9), more=st.integers(0, 20))
    def grow(self, which: int, more: int) -> None:
        ...

    @operation(which=st.integers(0, 9), num_tokens=st.integers(0, 40), more=st.integers(0, 9))
    def share(self, which: int, num_tokens: int, more: int) -> None:
        ...

    @operation(which=st.integers(0, 9), more=st.integers(0, 30))
    def trim(self, which: int, more: int) -> None:
        ...

    @operation(which=st.integers(0, 12))
    def free(self, which: int) -> None:
        ...

    def check(self) -> None:
        ...

    def end(self) -> None:
        ...
