"""Ask a drafter, between two steps, for draft tokens of decoding sequences. The worker verifies
them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from dovetail.interfaces.clock import Clock
from dovetail.interfaces.drafter import Drafter
from dovetail.sequence import Sequence
from dovetail.types import EngineStats

if TYPE_CHECKING:
    from dovetail.engine.adaptive import EverySequence

log = logging.getLogger(__name__)


class Speculation:
    """A drafter, its maximum number of draft tokens per sequence, and the policy that decides when
    and for which sequences to draft."""

    def __init__(
        self, drafter: Drafter, num_draft_tokens: int, policy: EverySequence, clock: Clock
    ) -> None:
        self._clock = clock
        self.drafter = drafter
        self.num_draft_tokens = num_draft_tokens
        self.policy = policy
        self.waits = False
        """True if the next step must not be planned before the step in flight has ended, because
        there are draft tokens in it, or its output is needed to propose some."""
        self.seconds = 0.0
        self.num_drafted, self.num_accepted = [0] * num_draft_tokens, [0] * num_draft_tokens
        """Number of draft tokens verified and accepted, by position."""

    def draft(self, running: list[Sequence], *, in_flight: bool) -> list[tuple[int, Exception]]:
        """Propose draft tokens for sequences that only wait for their next token. Returns the
        drafter's exceptions by seq_id.

        With a step in flight, only find out whether there are proposals, and set `waits` if so.
        """
        faults: list[tuple[int, Exception]] = []
        if in_flight and self.waits:
            return faults
        self.waits = False
        drafted: list[Sequence] = []
        drafts: list[list[int]] = []
        for seq in self.policy.due(running):
            began, draft, limit = self._clock.now(), list[int](), self._max_draft_tokens(seq)
            try:
                if limit > 0:
                    draft = self.drafter.propose(seq, limit)
            except Exception as e:
                faults.append((seq.seq_id, e))
            seconds = self._clock.now() - began
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

    def _max_draft_tokens(self, seq: Sequence) -> int:
        known = len(seq.tokens) + seq.num_in_flight
        if seq.finish_reason is not None or known != seq.num_computed_tokens + 1:
            return 0
        # The step also samples a token after the last draft token.
        return min(self.num_draft_tokens, seq.max_len - known - 1)

    def verified(self, seq: Sequence, num_drafted: int, num_accepted: int) -> None:
        """Record how many draft tokens of a sequence were accepted; 0 of 0 if it had none."""
        for i in range(num_drafted):
            self.num_drafted[i] += 1
            self.num_accepted[i] += i < num_accepted
        self.policy.verified(seq, num_drafted, num_accepted)

    def count(self, stats: EngineStats) -> None:
        stats.num_draft_tokens = sum(self.num_drafted)
        stats.num_accepted_tokens = sum(self.num_accepted)
        stats.drafted_by_position, stats.accepted_by_position = self.num_drafted, self.num_accepted
        stats.draft_seconds = self.seconds

    def forget(self, seq_id: int) -> None:
        self.policy.forget(seq_id)
        try:
            self.drafter.forget(seq_id)
        except Exception as e:  # the sequence has ended, so there is no request to fail
            log.error("the drafter raised an exception in forget: %s: %s", type(e).__name__, e)
