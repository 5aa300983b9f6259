"""Drive a worker like an engine: allocate blocks for sequences, build step plans by hand, and
record the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dovetail.interfaces.worker import Handle, Worker
from dovetail.types import (
    DRAFTED_BY_WORKER,
    KVGroup,
    SamplingParams,
    SequenceStart,
    StepPlan,
    StepResult,
)

GREEDY = SamplingParams(temperature=0, max_tokens=400)
EOS = 1


@dataclass
class SequenceState:
    """A sequence as the driver tracks it."""

    tokens: list[int]
    num_prompt: int
    params: SamplingParams
    seed: int
    index: int
    num_computed: int = 0
    on_worker: bool = False
    tables: list[list[int]] = field(default_factory=list)
    results: list[tuple[StepResult, int]] = field(default_factory=list)
    """Results of its rows: the step's result, and the row in it."""

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt :]


class Driver:
    """Drives one worker."""

    def __init__(self, worker: Worker, groups: list[KVGroup], num_blocks: list[int]) -> None:
        self.worker, self.groups = worker, groups
        self.free = [list(range(n - 1, 0, -1)) for n in num_blocks]
        self.sequences: dict[int, SequenceState] = {}
        self.released: list[int] = []
        self.num_steps = self.num_drafted = self.num_accepted = 0

    def add(
        self, prompt: list[int], params: SamplingParams = GREEDY, *, seed: int = 0, index: int = 0
    ) -> int:
        seq_id = len(self.sequences)
        self.sequences[seq_id] = SequenceState(list(prompt), len(prompt), params, seed, index)
        return seq_id

    def release(self, seq_id: int) -> None:
        """Preempt or end a sequence: free its blocks, and release it on the worker with the next
        plan."""
        state = self.sequences[seq_id]
        for free, table in zip(self.free, state.tables, strict=False):
            free.extend(reversed(table))
        if state.on_worker:
            self.released.append(seq_id)
        state.tables, state.num_computed, state.on_worker = [], 0, False

    def plan(
        self,
        rows: Sequence[tuple[int, int]],
        *,
        masked: bool = False,
        drafts: dict[int, list[int]] | None = None,
    ) -> StepPlan:
        """Build a plan from rows of (seq_id, number of tokens). A row that reaches the last known
        token samples; `drafts`, by seq_id, are the last tokens of such rows and are counted."""
        plan = StepPlan(self.num_steps, [], [], [], [], [], masked=masked)
        plan.released, self.released = self.released, []
        self.num_steps += 1
        for seq_id, count in rows:
            state = self.sequences[seq_id]
            if not state.on_worker:
                state.tables, state.on_worker = [[] for _ in self.groups], True
                start = SequenceStart(
                    seq_id,
                    f"r{seq_id}",
                    state.index,
                    list(state.tokens),
                    state.num_prompt,
                    [[] for _ in self.groups],
                    state.params,
                    state.seed,
                    [EOS],
                    state.num_prompt + (state.params.max_tokens or 0),
                )
                plan.starts.append(start)
            end = state.num_computed + count
            added = []
            for free, table, group in zip(self.free, state.tables, self.groups, strict=True):
                new = [free.pop() for _ in range(-(-end // group.block_size) - len(table))]
                table += new
                added.append(new)
            plan.seq_ids.append(seq_id)
            plan.num_tokens.append(count)
            plan.num_computed.append(state.num_computed)
            draft = drafts.get(seq_id, []) if drafts else []
            plan.samples.append(end == len(state.tokens) + len(draft))
            if drafts:
                plan.draft_token_ids.append(draft)
            plan.new_block_ids.append(added if any(added) else [])
            state.num_computed = end
        return plan

    def step(
        self,
        rows: Sequence[tuple[int, int]],
        masks: dict[int, bytes] | None = None,
        drafts: dict[int, list[int]] | None = None,
    ) -> StepResult:
        plan = self.plan(rows, masked=masks is not None, drafts=drafts)
        return self.take(plan, self.worker.submit(plan), masks)

    def take(
        self, plan: StepPlan, handle: Handle, masks: dict[int, bytes] | None = None
    ) -> StepResult:
        """Wait for the tokens of a step, check the shape of each row, and record them."""
        result = self.worker.sample(handle, masks)
        assert result.step_id == plan.step_id, (
            f"step {plan.step_id} was answered by step {result.step_id}"
        )
        assert len(result.token_ids) == len(plan.seq_ids), (
            f"{len(plan.seq_ids)} rows have {len(result.token_ids)} results"
        )
        for row, (seq_id, new) in enumerate(zip(plan.seq_ids, result.token_ids, strict=True)):
            state = self.sequences[seq_id]
            draft = plan.draft_token_ids[row] if plan.draft_token_ids else []
            if draft:
                verified(draft, new)
                self.num_drafted, self.num_accepted = (
                    self.num_drafted + len(draft),
                    self.num_accepted + len(new) - 1,
                )
                # KV computed for rejected draft tokens is computed again.
                state.num_computed -= len(draft) + 1 - len(new)
            elif seq_id not in result.failed:
                assert len(new) == plan.samples[row], (
                    f"a row with samples={plan.samples[row]} has tokens {new}"
                )
            state.tokens += new
            state.results.append((result, row))
        return result

    def generate(
        self, seq_ids: Sequence[int], num_tokens: int, *, chunk: int = 10**9
    ) -> list[list[int]]:
        """Run until each sequence has `num_tokens` output tokens. Tokens not yet computed are
        computed in rows of at most `chunk`."""
        while rows := [
            (i, min(chunk, len(t.tokens) - t.num_computed))
            for i in seq_ids
            if len((t := self.sequences[i]).output) < num_tokens
        ]:
            self.step(rows)
        return [self.sequences[i].output for i in seq_ids]

    def generate_with_drafts(
        self,
        seq_ids: Sequence[int],
        num_tokens: int,
        draft: Callable[[int, list[int], int], list[int]],
    ) -> list[list[int]]:
        """Run until each sequence has `num_tokens` output tokens. `draft(seq_id, output so far,
        limit)` proposes draft tokens."""
        while behind := [i for i in seq_ids if len(self.sequences[i].output) < num_tokens]:
            missing = {
                i: len(self.sequences[i].tokens) - self.sequences[i].num_computed for i in behind
            }
            drafts = {
                i: draft(
                    i, self.sequences[i].output, num_tokens - len(self.sequences[i].output) - 1
                )
                for i in behind
                if missing[i] == 1
            }
            self.step([(i, missing[i] + len(drafts.get(i, []))) for i in behind], drafts=drafts)
        return [self.sequences[i].output for i in seq_ids]

    def end(self, seq_ids: Sequence[int]) -> None:
        for seq_id in seq_ids:
            self.release(seq_id)


def verified(draft: list[int], new: list[int]) -> None:
    """Check that the sampled tokens follow the draft exactly as far as it was accepted."""
    assert 1 <= len(new) <= len(draft) + 1, (
        f"a row with {len(draft)} draft tokens has {len(new)} tokens"
    )
    if DRAFTED_BY_WORKER in draft:  # its draft tokens are not known
        return
    accepted = len(new) - 1
    assert new[:accepted] == draft[:accepted], (
        f"{accepted} of the draft tokens {draft} were accepted, but {new} were sampled"
    )
    assert accepted == len(draft) or new[-1] != draft[accepted], (
        f"{new} were sampled, but only {accepted} of the draft tokens {draft} were accepted"
    )
