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
from dovetail_testing.engines import AlikeMachine, Asked, EngineMachine, Outputs, Parts, Setup, WatchedEngine, alone, collect, request, requests_of, run, setups, workloads, workloads_alike
from dovetail_testing.simulated import Faults
PAGED = dovetail_kv_caches()[0]
PATIENCE = 3000

class SchedulerContract(Contract):
    extension_point = 'scheduler'

    @property
    def parts(self) -> Parts:
        ...

    def new_kv(self, setup: Setup) -> KVCacheManager:
        ...

    def new_scheduler(self, setup: Setup, kv: KVCacheManager) -> Scheduler:
        ...

    def alone(self, requests: list[Request], window: int | None=None) -> Outputs:
        ...

    @common_causes('the options do not extend SchedulerOptions', 'the capabilities are those of another extension point')
    def test_declaration(self) -> None:
        ...

    @common_causes('an early `continue` skips the accounting of tokens or sequences', 'blocks are not freed, or freed twice, on abort', 'a sequence is in neither list, or in both', 'a sequence is preempted while a step is in flight')
    def test_block_accounting_invariant_holds(self) -> None:
        ...

    @common_causes('num_computed_tokens is not reset on preemption', 'blocks are shared before they are computed', 'a row is planned as if tokens in flight were known')
    def test_scheduling_changes_no_output(self) -> None:
        ...

    @common_causes('a sequence that must wait (`reuse` returned None) is started, or blocks those behind it', 'blocks that were found are not freed again')
    def test_shared_beginnings_change_no_output(self) -> None:
        ...

    @common_causes('rows are not added with Sequence.add_row', 'an old value of num_to_compute is used', 'draft tokens are kept on preemption')
    def test_drafts_change_no_output(self) -> None:
        ...

    @pytest.mark.parametrize('overlap', [False, True])
    @common_causes('a preempted sequence is resumed without its output so far', 'its blocks are freed while its row is still in the plan')
    def test_tight_memory_changes_no_output(self, overlap: bool) -> None:
        ...

    @pytest.mark.parametrize('overlap', [False, True])
    @pytest.mark.parametrize('size', [(9, 6), (2, 1), (20, 25)], ids=['middling', 'tiny', 'alike'])
    @common_causes('new sequences overtake without bound: age those that wait', 'the same sequence is preempted each time')
    def test_nobody_starves_while_others_keep_coming(self, size: tuple[int, int], overlap: bool) -> None:
        ...

    @pytest.mark.parametrize('overlap', [False, True])
    @common_causes('`remove` searches only one list', 'state of a failed step is used in the next one')
    def test_a_failed_step_is_forgotten(self, overlap: bool) -> None:
        ...

    @pytest.mark.parametrize('index', range(6))
    @common_causes('new sequences are put in front', 'priorities are sorted the wrong way: lower runs first')
    def test_declared_order(self, index: int) -> None:
        ...

def new_reusing(setup: Setup) -> KVCacheManager:
    ...

class Knowing:

    def __init__(self, expected: Outputs) -> None:
        ...

    def propose(self, seq: Sequence, max_tokens: int) -> list[int]:
        ...

    def forget(self, seq_id: int) -> None:
        ...

def first_rows(engine: WatchedEngine, levels: list[int]) -> list[int]:
    ...
