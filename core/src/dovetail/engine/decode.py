"""Handle the most frequent rows without a call per row: decode rows, which compute the last known
token of a sequence and sample the next one.

Both functions do exactly what `Sequence.add_row` and `Engine._commit_row` do for any row. They stop
at the first row that needs more than that, leave it to the caller, and go on after it when they are
called again with the same iterator.
"""

from __future__ import annotations

from collections.abc import Iterator

from dovetail.sequence import NO_BLOCKS, Sequence
from dovetail.types import SequenceOutput, StepPlan

Row = tuple[int, tuple[int, int, list[int]]]
"""Index of a row in a step; its seq_id, the number of tokens computed before it, and the tokens
that it sampled."""


def add_decode_rows(running: Iterator[Sequence], plan: StepPlan, budget: int) -> Sequence | None:
    """Add at most `budget` decode rows for the next running sequences. Returns the first sequence
    that needs another kind of row, or None if there is none, or if the budget is used up."""
    drafts = plan.draft_token_ids
    while budget > 0 and (seq := next(running, None)) is not None:
        computed, known = seq.num_computed_tokens, len(seq.tokens) + seq.num_in_flight
        if not (
            known == computed + 1  # a prompt, or recomputation, has more to compute
            and computed < seq.num_slots  # else a block must be allocated
            and known < seq.max_len  # else the sequence needs no further token
            and not seq.draft_token_ids
            and seq.finish_reason is None  # else it only waits for its last step to end
        ):
            return seq
        plan.seq_ids.append(seq.seq_id)
        plan.num_tokens.append(1)
        plan.num_computed.append(computed)
        plan.samples.append(True)
        plan.new_block_ids.append(NO_BLOCKS)
        if drafts:
            drafts.append([])
        seq.num_computed_tokens = known
        seq.num_in_flight += 1
        seq.steps_in_flight += 1
        budget -= 1
    return None


def commit_decode_rows(
    rows: Iterator[Row],
    sequences: dict[int, Sequence],
    outputs: list[SequenceOutput],
    block_size: int,
) -> int | None:
    """Append the sampled tokens of decode rows to their sequences and to `outputs`. Returns the
    index of the first row that needs more than that, or None at the end.

    The caller has checked that the step has no draft tokens, log-probabilities or failed rows, and
    that no KV group has a window. `block_size` divides the block sizes of all groups.
    """
    for row, (seq_id, computed, new) in rows:
        seq = sequences[seq_id]
        if not (
            len(new) == 1
            and computed >= seq.num_prompt_tokens  # the first output token is timed and counted
            and seq.finish_reason is None  # else the token is surplus
            and len(seq.tokens) + 1 < seq.max_len
            and new[0] not in seq.end_ids
            and (computed + 1) % block_size  # a full block is reported to the KV-cache manager
        ):
            return row
        seq.steps_in_flight -= 1
        seq.num_in_flight -= 1
        seq.tokens.append(new[0])
        outputs.append(SequenceOutput(seq.request.request_id, seq.sample_index, new))
    return None
