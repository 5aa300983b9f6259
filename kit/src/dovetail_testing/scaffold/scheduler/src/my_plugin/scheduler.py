"""Which tokens run now. There is no prefill and no decode: a sequence has known tokens and computed
ones, and each step gives every scheduled sequence some tokens, so that the second catch up with the
first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.interfaces.kv_cache import KVCacheManager
from dovetail.sequence import Sequence
from dovetail.types import StepPlan

if TYPE_CHECKING:
    from my_plugin import MyPluginOptions


class MyPluginScheduler:
    """A `Scheduler`: one object an engine."""

    def __init__(self, kv: KVCacheManager, options: MyPluginOptions) -> None:
        self.kv = kv
        self.options = options
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._step_id = 0
        self._released: list[int] = []
        """Sequences that the worker is to forget, told with the next plan."""

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def remove(self, seq: Sequence) -> None:
        (self.running if seq in self.running else self.waiting).remove(seq)
        self._take_blocks(seq)

    def schedule(self, *, in_flight: bool) -> StepPlan | None:
        plan = StepPlan(self._step_id, [], [], [], [], [])
        budget, is_tight = self.options.max_num_batched_tokens, False
        for seq in self.running:  # oldest first; preemption takes from the end of this list
            count = min(seq.num_to_compute, budget)
            if count == 0 or seq.finish_reason is not None:
                continue
            while not self._add_row(plan, seq, count):
                is_tight = True
                # A step in flight may read any block, so that none can be taken now: asked again
                # when it has ended.
                if in_flight or self._preempt_newest() is seq:
                    break
            else:
                budget -= count
        # Whoever was preempted must not take its blocks straight back, unless nobody else can run.
        if not is_tight or not (plan.seq_ids or in_flight):
            self._admit(plan, budget)
        if not plan.seq_ids:
            return None
        plan.released, self._released = self._released, []
        self._step_id += 1
        return plan

    def _admit(self, plan: StepPlan, budget: int) -> None:
        """Newcomers, in order of arrival, while batch rows, tokens and blocks last."""
        for seq in list(self.waiting):
            if not budget or len(self.running) == self.options.max_num_seqs:
                return
            if seq.request.params.prompt_logprobs is None:  # those need the whole prompt computed
                found = self.kv.reuse(seq, len(seq.tokens) - 1, may_wait=True)
                if found is None:
                    continue  # one that runs is computing what this one needs next
                seq.num_computed_tokens = found
            count = min(seq.num_to_compute, budget)
            if not self._add_row(plan, seq, count):
                self.kv.free(seq.seq_id)  # what `reuse` found
                seq.restart()
                return
            self.waiting.remove(seq)
            self.running.append(seq)
            budget -= count

    def _add_row(self, plan: StepPlan, seq: Sequence, count: int) -> bool:
        """Give the sequence blocks for its next `count` tokens, and a row. False, and nothing
        changed, if there are none."""
        added = self.kv.grow(seq.seq_id, seq.num_computed_tokens + count)
        if added is None:
            return False
        seq.add_row(plan, count, added, self.kv.block_ids(seq.seq_id))
        return True

    def _preempt_newest(self) -> Sequence:
        """Take the blocks of the last that runs. It is computed again later: its output does not
        change."""
        seq = self.running.pop()
        self._take_blocks(seq)
        seq.restart()
        self.waiting.insert(0, seq)
        self.num_preemptions += 1
        return seq

    def _take_blocks(self, seq: Sequence) -> None:
        self.kv.free(seq.seq_id)
        if seq.on_worker:
            self._released.append(seq.seq_id)
            seq.on_worker = False
