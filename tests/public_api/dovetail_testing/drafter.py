from __future__ import annotations
import gc
import weakref
from dataclasses import fields
from functools import partial
from typing import Any
from hypothesis import strategies as st
from dovetail.interfaces.drafter import Drafter, DrafterCapabilities
from dovetail.plugin.provider import DrafterOptions, DraftModelOptions, Provider
from dovetail.sequence import Sequence
from dovetail.types import DRAFTED_BY_WORKER, Request, SamplingParams
from dovetail_testing.contract import KIT_MODEL, Contract, common_causes
from dovetail_testing.engines import Asked, EngineMachine, Parts, Setup, alone, requests_of, run, setups, workloads
from dovetail_testing.machines import Machine, beginning, operation
from dovetail_testing.prefix_cache import new_paged, new_scheduler

class DrafterContract(Contract):
    extension_point = 'speculation'

    @property
    def parts(self) -> Parts:
        ...

    def new(self) -> Drafter:
        ...

    @common_causes('the options do not extend DrafterOptions or DraftModelOptions', 'the capabilities are those of another extension point, or missing')
    def test_declaration(self) -> None:
        ...

    @common_causes('more tokens than requested', 'a token id outside the vocabulary', '`seq.tokens` is appended to, or stored and changed', 'an index is not keyed by seq_id', 'state of an ended sequence is used for a new one with the same seq_id', 'an index is not extended where it ended')
    def test_proposals(self) -> None:
        ...

    @common_causes('it raises an exception for short sequences', 'it returns something other than a list of ints')
    def test_drafting_changes_no_output(self) -> None:
        ...

    @common_causes('forget raises an exception for an unknown sequence', 'propose raises an exception after a preemption')
    def test_engine_invariants_hold(self) -> None:
        ...

    @common_causes('state is stored in the class or the module instead of the object')
    def test_two_engines_do_not_meet(self) -> None:
        ...

    @common_causes('sequences are stored in a list or as keys that `forget` does not search')
    def test_ended_sequences_are_let_go(self) -> None:
        ...

def runs_in_worker(provider: Provider[Any]) -> bool:
    ...

class Watched(Sequence):
    ...

def growing(tokens: list[int]) -> list[Sequence]:
    ...

def state_of(seq: Sequence) -> dict[str, Any]:
    ...

class ProposalsMachine(Machine):
    drafter: Drafter

    def __init__(self, contract: DrafterContract) -> None:
        ...

    @beginning()
    def build(self) -> None:
        ...

    @operation(seq_id=st.integers(0, 5), prompt=st.lists(st.integers(0, 3), min_size=1, max_size=30))
    def start(self, seq_id: int, prompt: list[int]) -> None:
        ...

    @operation(which=st.integers(0, 9), accepted=st.integers(0, 8), token=st.integers(0, 63), room=st.integers(1, 8))
    def step(self, which: int, accepted: int, token: int, room: int) -> None:
        ...

    @operation(which=st.integers(0, 9), room=st.integers(1, 8))
    def step_without_room(self, which: int, room: int) -> None:
        ...

    @operation(which=st.integers(0, 9), prompt=st.lists(st.integers(0, 3), min_size=1, max_size=30), room=st.integers(1, 8))
    def give_its_id_to_another(self, which: int, prompt: list[int], room: int) -> None:
        ...

    @operation(seq_id=st.integers(0, 9))
    def forget(self, seq_id: int) -> None:
        ...
