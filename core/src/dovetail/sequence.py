"""Define the engine's view of a sequence: its known tokens, its computed tokens, and the tokens
that steps in flight will add."""

from __future__ import annotations

from dataclasses import dataclass, field

from dovetail.types import FinishReason, Request, SequenceStart, StepPlan

NO_BLOCKS: list[list[int]] = []
"""Value of `StepPlan.new_block_ids` for a row that adds no blocks."""


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample of a request. The scheduler updates what is computed; commit updates what is
    known."""

    seq_id: int
    request: Request
    sample_index: int
    tokens: list[int]
    """Known tokens: prompt and committed output."""
    siblings: list[Sequence] = field(default_factory=list)
    """The live samples of the request, this one included. They can share prompt blocks."""

    num_prompt_tokens: int = field(init=False)
    max_len: int = field(init=False)
    """Upper bound on the number of tokens of the sequence, prompt included."""
    end_ids: frozenset[int] = field(init=False)
    """Tokens that may end the sequence: end-of-sequence tokens and the request's stop tokens."""

    num_computed_tokens: int = 0
    """Tokens whose KV is in the cache once the steps in flight have ended."""
    num_slots: int = 0
    """Number of tokens for which slots are allocated, as far as the scheduler has recorded it. The
    built-in schedulers use it to skip `KVCacheManager.grow`; others may leave it 0."""
    num_in_flight: int = 0
    """Tokens that steps in flight will sample; their ids are not known yet."""
    steps_in_flight: int = 0
    """Steps in flight with a row of this sequence. Its blocks may be freed only when this is 0."""
    draft_token_ids: list[int] = field(default_factory=list)
    """Draft tokens not yet in a step. The step that contains them verifies them."""
    num_prompt_counted: int = 0
    """Prompt tokens already counted in the stats; a preempted prompt is computed again but not
    counted again."""
    num_prompt_logprobs: int = 0
    """Prompt log-probabilities already returned; a preempted prompt is computed again but not
    reported again."""
    on_worker: bool = False
    """True if the worker knows this sequence."""
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    """Number of leading tokens whose KV was found in the prefix cache when the sequence first
    ran."""
    added_at: float = 0.0
    """Time at which its request was added, on the engine's clock."""
    started_at: float = 0.0
    """Time at which its first step was submitted, on the engine's clock; 0 before that."""

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
        """Number of known tokens, tokens that steps in flight will sample, and draft tokens.
        `num_computed_tokens` must catch up with it."""
        return len(self.tokens) + self.num_in_flight + len(self.draft_token_ids)

    @property
    def num_to_compute(self) -> int:
        """Number of tokens left to compute. It is 0 once all output is known or in flight, because
        the last token needs no KV of its own."""
        if self.num_in_flight + self.num_output_tokens > 0 and self.num_tokens >= self.max_len:
            return 0
        return self.num_tokens - self.num_computed_tokens

    def add_row(
        self, plan: StepPlan, count: int, added: list[list[int]], tables: list[list[int]]
    ) -> None:
        """Add a row for the next `count` tokens to a plan. This is the last thing a scheduler does
        with a sequence in a step.

        Args:
            tables: all blocks of the sequence, per KV group.
            added: the blocks allocated for this row, per KV group.

        Draft tokens that do not fit into `count` are dropped.
        """
        if not self.on_worker:
            # The start carries the blocks shared so far; the blocks of this step are in the row.
            plan.starts.append(
                self.start([t[: len(t) - len(new)] for t, new in zip(tables, added, strict=True)])
            )
            self.on_worker = True
        if self.draft_token_ids:
            known = len(self.tokens) + self.num_in_flight - self.num_computed_tokens
            del self.draft_token_ids[max(0, count - known) :]
            if not plan.draft_token_ids:
                plan.draft_token_ids = [[] for _ in plan.seq_ids]
            plan.draft_token_ids.append(self.draft_token_ids)
        elif plan.draft_token_ids:
            plan.draft_token_ids.append([])
        samples = self.num_computed_tokens + count == self.num_tokens < self.max_len
        plan.seq_ids.append(self.seq_id)
        plan.num_tokens.append(count)
        plan.num_computed.append(self.num_computed_tokens)
        plan.samples.append(samples)
        plan.new_block_ids.append(added if any(added) else NO_BLOCKS)
        self.draft_token_ids = []
        self.num_computed_tokens += count
        self.num_in_flight += samples
        self.steps_in_flight += 1

    def restart(self) -> None:
        """Compute the sequence again from the beginning, output tokens included, because its blocks
        have been taken away."""
        self.num_computed_tokens = self.num_slots = 0
        self.draft_token_ids = []

    def start(self, block_ids: list[list[int]]) -> SequenceStart:
        """Build what the worker needs to know before the first row of this sequence."""
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
