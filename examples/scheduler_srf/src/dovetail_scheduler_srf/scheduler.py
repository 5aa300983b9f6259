"""Schedule sequences by the number of tokens still to be computed, minus an allowance for each step
since their arrival.

The allowance grows without bound and the number of tokens does not. The oldest sequence therefore
eventually becomes the most urgent, is admitted first and preempted last, so no sequence starves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.interfaces.kv_cache import KVCacheManager
from dovetail.sequence import Sequence
from dovetail.types import StepPlan

if TYPE_CHECKING:
    from dovetail_scheduler_srf import SrfOptions


class ShortestRemainingFirst:
    """A `Scheduler`. A shorter new sequence waits for a free batch row and does not preempt running
    sequences."""

    def __init__(self, kv: KVCacheManager, options: SrfOptions) -> None:
        self.kv = kv
        self.options = options
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._step_id = 0
        self._arrived: dict[int, int] = {}
        """Step id at arrival, by seq_id."""
        self._released: list[int] = []
        self._preemption_due = False

    def add(self, seq: Sequence) -> None:
        self._arrived[seq.seq_id] = self._step_id
        self.waiting.append(seq)

    def remove(self, seq: Sequence) -> None:
        (self.running if seq in self.running else self.waiting).remove(seq)
        del self._arrived[seq.seq_id]
        self._free_blocks(seq)

    def schedule(self, *, in_flight: bool) -> StepPlan | None:
        if in_flight and self._preemption_due:
            return None  # called again when no step is in flight
        self._preemption_due = False
        self.waiting.sort(key=self._urgency)
        self.running.sort(key=self._urgency)
        plan = StepPlan(self._step_id, [], [], [], [], [])
        budget = self.options.max_num_batched_tokens
        is_short_of_blocks = False
        for seq in self.running:  # preemption removes sequences from the end of this list
            if budget == 0 or is_short_of_blocks:
                break
            count = min(seq.num_to_compute, budget)
            if count <= 0 or seq.finish_reason is not None:
                continue
            while not self._add_row(plan, seq, count):
                is_short_of_blocks = True
                if in_flight:
                    self._preemption_due = True
                    break
                last = self.running[-1]
                self._preempt(last)
                if last is seq:
                    break
            else:
                budget -= count
        # A sequence must not be admitted in the step that preempted it, unless no other sequence
        # can run.
        if not is_short_of_blocks or not (plan.seq_ids or in_flight):
            self._admit(plan, budget)
        if not plan.seq_ids:
            return None
        plan.released, self._released = self._released, []
        self._step_id += 1
        return plan

    def _urgency(self, seq: Sequence) -> float:
        """Return the sort key: lower values are more urgent."""
        return (
            seq.max_len
            - seq.num_computed_tokens
            - self.options.ageing * (self._step_id - self._arrived[seq.seq_id])
        )

    def _admit(self, plan: StepPlan, budget: int) -> None:
        for seq in list(self.waiting):
            if budget == 0 or len(self.running) == self.options.max_num_seqs:
                return
            if seq.request.params.prompt_logprobs is None:  # these need the whole prompt
                found = self.kv.reuse(seq, len(seq.tokens) - 1, may_wait=True)
                if found is None:
                    continue  # a running sequence is computing the blocks that this one needs next
                seq.num_computed_tokens = found
            count = min(seq.num_to_compute, budget)
            if not self._add_row(plan, seq, count):
                self.kv.free(seq.seq_id)
                seq.restart()
                return
            self.waiting.remove(seq)
            self.running.append(seq)
            budget -= count

    def _add_row(self, plan: StepPlan, seq: Sequence, count: int) -> bool:
        """Allocate blocks for the sequence's next `count` tokens and add its row to the plan.
        Returns False, and changes nothing, if there are not enough blocks."""
        end = seq.num_computed_tokens + count
        added = self.kv.grow(seq.seq_id, end)
        if added is None:
            return False
        seq.add_row(plan, count, added, self.kv.block_ids(seq.seq_id))
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Free the sequence's blocks. It is computed again later, including the tokens generated so
        far, so its output does not change."""
        self.running.remove(seq)
        self._free_blocks(seq)
        seq.restart()
        self.waiting.append(seq)
        self.num_preemptions += 1

    def _free_blocks(self, seq: Sequence) -> None:
        self.kv.free(seq.seq_id)
        if seq.on_worker:
            self._released.append(seq.seq_id)
            seq.on_worker = False
