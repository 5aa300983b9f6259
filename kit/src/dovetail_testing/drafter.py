"""Test the contract of the drafter's extension point (`speculation`). A plugin's test is a
subclass:

    class TestMyDrafter(DrafterContract):
        provider = PROVIDER
"""

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
from dovetail_testing.engines import (
    Asked,
    EngineMachine,
    Parts,
    Setup,
    alone,
    requests_of,
    run,
    setups,
    workloads,
)
from dovetail_testing.machines import Machine, beginning, operation
from dovetail_testing.prefix_cache import new_paged, new_scheduler


class DrafterContract(Contract):
    """The contract of drafters. Subclass it and set `provider`."""

    extension_point = "speculation"

    @property
    def parts(self) -> Parts:
        options = self.settled_options()
        assert isinstance(options, DrafterOptions), (
            "the options must be a subclass of DrafterOptions"
        )
        return Parts(
            new_paged,
            new_scheduler,
            self.new,
            options.num_draft_tokens,
            runs_in_worker(self.provider),
        )

    def new(self) -> Drafter:
        drafter: Drafter = self.build()
        return drafter

    @common_causes(
        "the options do not extend DrafterOptions or DraftModelOptions",
        "the capabilities are those of another extension point, or missing",
    )
    def test_declaration(self) -> None:
        """The options are a subclass of `DrafterOptions` (of `DraftModelOptions`, if the drafter
        runs in the worker), and the capabilities are `DrafterCapabilities`."""
        can = self.provider.capabilities
        assert isinstance(can, DrafterCapabilities), f"the capabilities are a {type(can).__name__}"
        base = DraftModelOptions if runs_in_worker(self.provider) else DrafterOptions
        assert issubclass(self.provider.options, base), (
            f"the options must be a subclass of {base.__name__}"
        )

    @common_causes(
        "more tokens than requested",
        "a token id outside the vocabulary",
        "`seq.tokens` is appended to, or stored and changed",
        "an index is not keyed by seq_id",
        "state of an ended sequence is used for a new one with the same seq_id",
        "an index is not extended where it ended",
    )
    def test_proposals(self) -> None:
        """The drafter proposes at most `max_tokens` existing tokens (or leaves them to the worker,
        if it runs there) and does not modify the sequence. Unless it declares that it learns from
        other requests, it proposes what a new drafter would: nothing leaks between sequences."""
        self.run_machine(partial(ProposalsMachine, self), examples=120)

    @common_causes(
        "it raises an exception for short sequences",
        "it returns something other than a list of ints",
    )
    def test_drafting_changes_no_output(self) -> None:
        """A sequence has the same output as without draft tokens, greedy and sampled, however it is
        batched, preempted and resumed."""

        def same_as_without(setup: Setup, workload: list[Asked]) -> None:
            requests = requests_of(workload)
            expected = alone(Parts(new_paged, new_scheduler), requests, setup.window)
            got = run(self.parts.engine(setup), requests, [a.arrival for a in workload])
            different = [key for key in expected if got.get(key) != expected[key]]
            assert not different, (
                f"the outputs of {different} differ from those without draft tokens"
            )

        self.run_examples(same_as_without, examples=60, setup=setups, workload=workloads)

    @common_causes(
        "forget raises an exception for an unknown sequence",
        "propose raises an exception after a preemption",
    )
    def test_engine_invariants_hold(self) -> None:
        """Requests are added, run and aborted at any time, also between drafting and verification:
        no request fails."""
        self.run_machine(partial(EngineMachine, self.parts), examples=40)

    @common_causes("state is stored in the class or the module instead of the object")
    def test_two_engines_do_not_meet(self) -> None:
        """Calls of one object do not change the proposals of another, although both know sequences
        with the same `seq_id`."""
        texts = [[1, 2, 3, 1, 2, 3, 1, 2], [3, 2, 1, 3, 2, 1, 3]]
        alone = []
        for tokens in texts:
            drafter = self.new()
            alone.append([drafter.propose(s, 4) for s in growing(tokens)])
            drafter.forget(0)
        pair = [self.new(), self.new()]
        together: list[list[list[int]]] = [[], []]
        for sequences in zip(*map(growing, texts), strict=False):
            for drafter, seq, proposals in zip(pair, sequences, together, strict=True):
                proposals.append(drafter.propose(seq, 4))
        for proposals, expected in zip(together, alone, strict=True):
            assert proposals == expected[: len(proposals)], (
                f"beside another drafter it proposes {proposals}, but alone"
                f" {expected[: len(proposals)]}"
            )

    @common_causes("sequences are stored in a list or as keys that `forget` does not search")
    def test_ended_sequences_are_let_go(self) -> None:
        """After `forget` nothing refers to the sequence any more: a server has millions of them
        during its life."""
        drafter, ended = self.new(), []
        for seq_id in range(3):
            seq = Watched(
                seq_id, Request("r", [1, 2, 1], SamplingParams(), 99, 0, []), 0, [1, 2, 1]
            )
            drafter.propose(seq, 4)
            drafter.forget(seq_id)
            ended.append(weakref.ref(seq))
            del seq
        gc.collect()
        num_alive = sum(ref() is not None for ref in ended)
        assert num_alive == 0, f"{num_alive} of {len(ended)} ended sequences are still referenced"


def runs_in_worker(provider: Provider[Any]) -> bool:
    can = provider.capabilities
    return isinstance(can, DrafterCapabilities) and can.runs_in == "worker"


class Watched(Sequence):
    """A sequence that supports weak references."""

    __slots__ = ("__weakref__",)


def growing(tokens: list[int]) -> list[Sequence]:
    """Return a sequence with seq_id 0 at every length from 1 on."""
    request = Request("r", tokens[:1], SamplingParams(), 99, 0, [])
    return [
        Sequence(0, request, 0, tokens[:i], num_computed_tokens=i - 1)
        for i in range(1, len(tokens) + 1)
    ]


def state_of(seq: Sequence) -> dict[str, Any]:
    values = {f.name: getattr(seq, f.name) for f in fields(seq)}
    return {
        name: list(value) if isinstance(value, list) else value for name, value in values.items()
    }


class ProposalsMachine(Machine):
    """A state machine of sequences that grow by proposed tokens, other tokens, or both, and end at
    any time."""

    drafter: Drafter

    def __init__(self, contract: DrafterContract) -> None:
        super().__init__()
        self.contract = contract
        self.sequences: dict[int, Sequence] = {}

    @beginning()
    def build(self) -> None:
        self.drafter = self.contract.new()

    @operation(
        seq_id=st.integers(0, 5), prompt=st.lists(st.integers(0, 3), min_size=1, max_size=30)
    )
    def start(self, seq_id: int, prompt: list[int]) -> None:
        if seq_id not in self.sequences:
            self._start(seq_id, prompt)

    def _start(self, seq_id: int, prompt: list[int]) -> None:
        other = self.sequences.get(seq_id ^ 1)  # the other sample of its request
        request = (
            other.request
            if other
            else Request(f"r{seq_id // 2}", prompt, SamplingParams(n=2), 1000, 0, [])
        )
        self.sequences[seq_id] = Sequence(
            seq_id, request, seq_id % 2, list(request.prompt_token_ids)
        )

    @operation(
        which=st.integers(0, 9),
        accepted=st.integers(0, 8),
        token=st.integers(0, 63),
        room=st.integers(1, 8),
    )
    def step(self, which: int, accepted: int, token: int, room: int) -> None:
        if self.sequences:
            seq = list(self.sequences.values())[which % len(self.sequences)]
            draft = self._propose(seq, room)
            # A token that the worker proposes may be any token.
            seq.tokens += [
                *(token if t == DRAFTED_BY_WORKER else t for t in draft[:accepted]),
                token,
            ]

    @operation(which=st.integers(0, 9), room=st.integers(1, 8))
    def step_without_room(self, which: int, room: int) -> None:
        """Call the drafter although the next step does not contain the sequence."""
        if self.sequences:
            self._propose(list(self.sequences.values())[which % len(self.sequences)], room)

    def _propose(self, seq: Sequence, room: int) -> list[int]:
        seq.num_computed_tokens = len(seq.tokens) - 1
        before = state_of(seq)
        draft = self.drafter.propose(seq, room)
        after = state_of(seq)
        changed = [name for name in before if after[name] != before[name]]
        assert not changed, f"propose changed {changed} of the sequence"
        assert isinstance(draft, list), f"propose returned {draft!r}, which is not a list"
        assert len(draft) <= room, (
            f"at most {room} tokens were requested, but {len(draft)} were proposed"
        )
        if runs_in_worker(self.contract.provider):
            assert all(t == DRAFTED_BY_WORKER for t in draft), (
                f"the drafter runs in the worker, but proposed {draft}"
            )
        else:
            wrong = [t for t in draft if type(t) is not int or not 0 <= t < KIT_MODEL.vocab_size]
            assert not wrong, (
                f"{wrong} were proposed, but the vocabulary has {KIT_MODEL.vocab_size} tokens"
            )
        if not self._learns():
            fresh: Any = self.contract.new()
            alone = fresh.propose(seq, room)
            assert draft == alone, (
                f"after {seq.tokens} it proposes {draft}, but a new drafter proposes {alone}"
            )
            fresh.forget(seq.seq_id)
        return draft

    @operation(
        which=st.integers(0, 9),
        prompt=st.lists(st.integers(0, 3), min_size=1, max_size=30),
        room=st.integers(1, 8),
    )
    def give_its_id_to_another(self, which: int, prompt: list[int], room: int) -> None:
        if self.sequences:
            seq_id = list(self.sequences)[which % len(self.sequences)]
            self.drafter.forget(seq_id)
            del self.sequences[seq_id]
            self._start(seq_id, prompt)
            self._propose(self.sequences[seq_id], room)

    def _learns(self) -> bool:
        can = self.contract.provider.capabilities
        return isinstance(can, DrafterCapabilities) and can.learns_from_other_requests

    @operation(seq_id=st.integers(0, 9))
    def forget(self, seq_id: int) -> None:
        self.drafter.forget(seq_id)  # the sequence may be unknown
        self.sequences.pop(seq_id, None)
