"""The engine's view of a sequence: known tokens, computed tokens, and what steps in flight will
add."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from dovetail.types import FinishReason, Request, SequenceStart, StepPlan

NO_BLOCKS: list[list[int]] = []
"""In a plan: the row adds none."""


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample of a request. Changed by the scheduler (what is computed) and by commit (what is
    known)."""

    seq_id: int
    request: Request
    sample_index: int
    tokens: list[int]
    """Known tokens: prompt and committed output."""
    siblings: list[Sequence] = field(default_factory=list)
    """The other samples of the request that are alive, and this one: they can share prompt
    blocks."""

    num_prompt_tokens: int = field(init=False)
    max_len: int = field(init=False)
    """Bound on the number of tokens that it will ever hold."""
    end_ids: frozenset[int] = field(init=False)
    """Tokens that may end it: end of sequence, and its request's stop tokens."""

    num_computed_tokens: int = 0
    """Tokens whose KV is in the cache, once the steps in flight have ended."""
    num_slots: int = 0
    """Tokens that its blocks have room for, as far as the scheduler has asked."""
    num_in_flight: int = 0
    """Tokens that steps in flight will sample: known to be coming, not yet what they are."""
    steps_in_flight: int = 0
    """Steps in flight with a row of this sequence: until 0, its blocks may not be freed."""
    draft_token_ids: list[int] = field(default_factory=list)
    """Proposed and not yet in a step: the step that takes them verifies them."""
    num_prompt_counted: int = 0
    """Prompt tokens that the stats have counted, for the same reason as the next."""
    num_prompt_logprobs: int = 0
    """Prompt log-probabilities given out: a preempted prompt is computed again, not reported
    again."""
    on_worker: bool = False
    """The worker knows this sequence."""
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    """First tokens whose KV was found computed when it first ran."""
    added_at: float = field(default_factory=time.monotonic)
    started_at: float = 0.0
    """When its first step was planned, on the same clock; 0 while it waits for that."""

    def __post_init__(self) -> None:
        r = self.request
        self.num_prompt_tokens = len(r.prompt_token_ids)
        self.max_len = self.num_prompt_tokens + r.max_tokens
        self.end_ids = frozenset((*r.eos_token_ids, *r.params.stop_token_ids))

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        """Known tokens, with those that steps in flight will sample, and drafts: what
        `num_computed_tokens` must catch up with."""
        return len(self.tokens) + self.num_in_flight + len(self.draft_token_ids)

    @property
    def num_to_compute(self) -> int:
        """Tokens to catch up with now. 0 when all output is known or coming: a last token needs no
        KV of its own."""
        if self.num_in_flight + self.num_output_tokens > 0 and self.num_tokens >= self.max_len:
            return 0
        return self.num_tokens - self.num_computed_tokens

    def add_row(
        self, plan: StepPlan, count: int, added: list[list[int]], tables: list[list[int]]
    ) -> None:
        """Put a row of its next `count` tokens into a plan: the last thing a scheduler does with a
        sequence in a step.

        Per KV group, `tables` has all its blocks and `added` those that it got for this row. Drafts
        for which `count` has no room are dropped.
        """
        if not self.on_worker:
            # The blocks shared so far; those of this step travel in the row.
            plan.starts.append(
                self.start([t[: len(t) - len(new)] for t, new in zip(tables, added, strict=True)])
            )
            self.on_worker = True
            self.started_at = self.started_at or time.monotonic()
        if self.draft_token_ids:
            known = len(self.tokens) + self.num_in_flight - self.num_computed_tokens
            del self.draft_token_ids[max(0, count - known) :]
            plan.draft_token_ids += [
                [] for _ in range(len(plan.seq_ids) - len(plan.draft_token_ids))
            ]
            plan.draft_token_ids.append(self.draft_token_ids)
        samples = self.num_computed_tokens + count == self.num_tokens < self.max_len
        plan.seq_ids.append(self.seq_id)
        plan.num_tokens.append(count)
        plan.num_computed.append(self.num_computed_tokens)
        plan.samples.append(samples)
        plan.new_block_ids.append(added if any(added) else NO_BLOCKS)
        if plan.draft_token_ids and len(plan.draft_token_ids) < len(plan.seq_ids):
            plan.draft_token_ids.append([])
        self.draft_token_ids = []
        self.num_computed_tokens += count
        self.num_in_flight += samples
        self.steps_in_flight += 1

    def restart(self) -> None:
        """Its blocks have been taken: it is computed again from the beginning, with what it has
        said so far."""
        self.num_computed_tokens = self.num_slots = 0
        self.draft_token_ids = []

    def start(self, block_ids: list[list[int]]) -> SequenceStart:
        """What a worker must be told before the first row of this sequence."""
        r = self.request
        return SequenceStart(
            self.seq_id,
            r.request_id,
            self.sample_index,
            list(self.tokens),
            self.num_prompt_tokens,
            block_ids,
            r.params,
            r.seed,
            r.eos_token_ids,
            self.max_len,
            r.adapter_id,
        )
