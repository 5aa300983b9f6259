"""Asking a drafter, between two steps, what the sequences that decode may say next. Verification is
the worker's."""

from __future__ import annotations

import logging
from time import perf_counter
from typing import TYPE_CHECKING

from dovetail.interfaces.drafter import Drafter
from dovetail.sequence import Sequence
from dovetail.types import EngineStats

if TYPE_CHECKING:
    from dovetail.engine.adaptive import EverySequence

log = logging.getLogger(__name__)


class Speculation:
    """A drafter, how many tokens it may propose for a sequence, and the policy that says when and
    for whom."""

    def __init__(self, drafter: Drafter, num_draft_tokens: int, policy: EverySequence) -> None:
        self.drafter = drafter
        self.num_draft_tokens = num_draft_tokens
        self.policy = policy
        self.waits = False
        """The next step is planned when the one in flight has ended: there are drafts in it, or for
        what it says."""
        self.seconds = 0.0
        self.num_drafted, self.num_accepted = [0] * num_draft_tokens, [0] * num_draft_tokens
        """By position."""

    def draft(self, running: list[Sequence], *, in_flight: bool) -> list[tuple[int, Exception]]:
        """Give drafts to sequences that only wait for their next token. Returns, by seq_id, what
        went wrong.

        With a step in flight, only see who would have any: it `waits` for those.
        """
        faults: list[tuple[int, Exception]] = []
        if in_flight and self.waits:
            return faults
        self.waits = False
        drafted: list[Sequence] = []
        drafts: list[list[int]] = []
        for seq in self.policy.due(running):
            began, draft, room = perf_counter(), list[int](), self._room(seq)
            try:
                if room > 0:
                    draft = self.drafter.propose(seq, room)
            except Exception as e:
                faults.append((seq.seq_id, e))
            seconds = perf_counter() - began
            self.seconds += seconds
            self.policy.on_proposed(seq, bool(draft), seconds)
            if draft:
                drafted.append(seq)
                drafts.append(draft)
        self.waits = bool(drafted)
        if drafted and not in_flight:
            counts = self.policy.share(drafted, [len(draft) for draft in drafts], len(running))
            for seq, draft, count in zip(drafted, drafts, counts, strict=True):
                seq.draft_token_ids = draft[:count]
        return faults

    def _room(self, seq: Sequence) -> int:
        known = len(seq.tokens) + seq.num_in_flight
        if seq.finish_reason is not None or known != seq.num_computed_tokens + 1:
            return 0
        # The step also samples a token after the last draft.
        return min(self.num_draft_tokens, seq.max_len - known - 1)

    def verified(self, seq: Sequence, num_drafted: int, num_accepted: int) -> None:
        """What became of a sequence's drafts; 0 of 0 for one that decodes without."""
        for i in range(num_drafted):
            self.num_drafted[i] += 1
            self.num_accepted[i] += i < num_accepted
        self.policy.verified(seq, num_drafted, num_accepted)

    def count(self, stats: EngineStats) -> None:
        stats.num_draft_tokens, stats.num_accepted_tokens = (
            sum(self.num_drafted),
            sum(self.num_accepted),
        )
        stats.drafted_by_position, stats.accepted_by_position = self.num_drafted, self.num_accepted
        stats.draft_seconds = self.seconds

    def forget(self, seq_id: int) -> None:
        self.policy.forget(seq_id)
        try:
            self.drafter.forget(seq_id)
        except Exception as e:  # the sequence has ended: nobody is left to fail
            log.error("the drafter failed to forget a sequence: %s: %s", type(e).__name__, e)
