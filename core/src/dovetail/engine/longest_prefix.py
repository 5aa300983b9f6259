"""Schedule waiting sequences by the length of their cached prefix, so that cached blocks are used
before they are evicted.

This order alone would let a sequence without a cached prefix starve. A sequence that has been
overtaken by `max_overtaken` later ones therefore goes first from the next step on: fewer than
`max_overtaken + max_num_seqs` later sequences start before it, not counting those that start while
it waits for blocks that a running sequence is computing.
"""

from __future__ import annotations

from bisect import bisect

from dovetail.engine.scheduler import TokenBudgetScheduler, fcfs
from dovetail.interfaces.kv_cache import KVCacheManager
from dovetail.sequence import Sequence
from dovetail.types import StepPlan

LOOKAHEAD = 64
"""Number of waiting sequences to consider. The lookup takes time in every step that admits
sequences."""


class LongestPrefixScheduler(TokenBudgetScheduler):
    """A first-come-first-served scheduler that starts, among the first `LOOKAHEAD` waiting
    sequences, the one with the longest cached prefix."""

    def __init__(
        self,
        kv: KVCacheManager,
        max_overtaken: int,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ) -> None:
        super().__init__(
            kv, fcfs, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
        )
        self._max_overtaken = max_overtaken
        self._num_overtaken: dict[int, int] = {}
        """Number of later sequences that have started, by waiting sequence."""

    def remove(self, seq: Sequence) -> None:
        self._num_overtaken.pop(seq.seq_id, None)
        super().remove(seq)

    def _admit(self, plan: StepPlan, budget: int) -> None:
        before = {s.seq_id for s in self.running}
        super()._admit(plan, budget)
        started = sorted(s.seq_id for s in self.running if s.seq_id not in before)
        for seq_id in started:
            self._num_overtaken.pop(seq_id, None)
        if started:
            for seq in self.waiting:
                if later := len(started) - bisect(started, seq.seq_id):
                    self._num_overtaken[seq.seq_id] = self._num_overtaken.get(seq.seq_id, 0) + later

    def _queue(self) -> list[Sequence]:
        near, far = self.waiting[:LOOKAHEAD], self.waiting[LOOKAHEAD:]
        return sorted(near, key=self._sort_key) + far

    def _sort_key(self, seq: Sequence) -> tuple[int, int, int]:
        if self._num_overtaken.get(seq.seq_id, 0) >= self._max_overtaken:
            return 0, 0, seq.seq_id
        return 1, -self.kv.num_cached(seq, len(seq.tokens) - 1), seq.seq_id
