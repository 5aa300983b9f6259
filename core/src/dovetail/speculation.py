"""Asking a drafter, between two steps, what the sequences that decode may say next. Verification is the worker's."""

from __future__ import annotations

import logging

from dovetail.errors import PluginError
from dovetail.interfaces.drafter import Drafter
from dovetail.sequence import Sequence
from dovetail.types import DRAFTED_BY_WORKER

log = logging.getLogger(__name__)


class Speculation:
    """A drafter, and how many tokens it may propose."""

    def __init__(self, drafter: Drafter, num_draft_tokens: int, vocab_size: int, *, runs_in_worker: bool = False) -> None:
        self.drafter = drafter
        self.num_draft_tokens = num_draft_tokens
        self.allowed = range(DRAFTED_BY_WORKER, DRAFTED_BY_WORKER + 1) if runs_in_worker else range(vocab_size)

    def draft(self, running: list[Sequence]) -> list[tuple[int, Exception]]:
        """Give drafts to the sequences that only wait for their next token. Returns, by seq_id, what went wrong."""
        faults: list[tuple[int, Exception]] = []
        for seq in running:
            seq.is_drafted = True
            if seq.num_in_flight or seq.finish_reason is not None or len(seq.tokens) != seq.num_computed_tokens + 1:
                continue
            # The step also draws a token after the last draft.
            room = min(self.num_draft_tokens, seq.max_len - len(seq.tokens) - 1)
            if room > 0:
                try:
                    seq.draft_token_ids = self._propose(seq, room)
                except Exception as e:
                    faults.append((seq.seq_id, e))
        return faults

    def forget(self, seq_id: int) -> None:
        try:
            self.drafter.forget(seq_id)
        except Exception as e:  # the sequence has ended: nobody is left to fail
            log.error("the drafter failed to forget a sequence: %s: %s", type(e).__name__, e)

    def _propose(self, seq: Sequence, room: int) -> list[int]:
        draft = self.drafter.propose(seq, room)
        if not isinstance(draft, list) or len(draft) > room:
            raise PluginError(f"the drafter was asked for a list of at most {room} tokens and proposed {draft!r}")
        for token in draft:
            if type(token) is not int or token not in self.allowed:
                raise PluginError(
                    f"the drafter proposed {token!r}; tokens are from {self.allowed.start} to {self.allowed.stop - 1}"
                )
        return draft[:]
