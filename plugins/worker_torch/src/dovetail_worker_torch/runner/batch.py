"""What the worker knows of its sequences between steps, and a step's input arrays, built without a
loop over rows.

Every sequence has a batch row: a row of a few flat host arrays. A step's inputs are gathered from
those by index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dovetail.types import KVGroup, SamplingParams, SequenceStart, StepPlan

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]


@dataclass
class StepInputs:
    """The ragged batch of one step: B rows, T tokens. Never changed."""

    batch_indices: I64
    """[B]"""
    batch_index_of_token: I64
    """[T]"""
    positions: I64
    """[T]"""
    query_start: I32
    """[B + 1]"""
    seq_lens: I32
    """[B], this step's tokens included."""
    host_query_start: list[int]
    host_seq_lens: list[int]
    slot_mapping: list[I64]
    """Per KV group: [T]"""
    block_table: list[I32]
    """Per KV group: [B, max_blocks of this step]"""


class SequenceTable:
    """Seats for `max_num_seqs` sequences of at most `max_len` tokens. Memory is touched only as it
    is used."""

    def __init__(
        self,
        max_num_seqs: int,
        max_len: int,
        groups: list[KVGroup],
        draft_group: KVGroup | None = None,
    ) -> None:
        """`groups` are the model's. That of a draft model comes after them, and is no part of a
        step's inputs."""
        self.max_num_seqs, self.max_len = max_num_seqs, max_len
        self.draft_group = len(groups)
        """Its index, if there is one."""
        self._num_model_groups, groups = (
            len(groups),
            [*groups, *([draft_group] if draft_group is not None else [])],
        )
        self.batch_index_of: dict[int, int] = {}
        self.start_of: dict[int, SequenceStart] = {}
        """By batch row."""
        self.token_ids = np.zeros((max_num_seqs, max_len + 1), np.int32)
        self._special_indices: set[int] = set()
        self._one_each = np.arange(max_num_seqs + 1, dtype=np.int32)
        self._row_seq_ids: list[int] = []
        self._row_batch_indices: I64 = np.zeros(0, np.int64)
        self._free = list(range(max_num_seqs - 1, -1, -1))
        self._groups = groups
        self._block_table: list[I32] = [
            np.zeros((max_num_seqs, max_len // g.block_size + 1), np.int32) for g in groups
        ]
        self._first_slot: list[I64] = [np.zeros(t.shape, np.int64) for t in self._block_table]
        """Of each block in the table."""
        self._num_blocks: list[I64] = [np.zeros(max_num_seqs, np.int64) for _ in groups]

    def update(self, plan: StepPlan) -> None:
        """Take in a plan's released and started sequences, its drafts, and the blocks its rows were
        given."""
        for seq_id in plan.released:
            batch_index = self.batch_index_of.pop(seq_id, None)
            if batch_index is not None:
                del self.start_of[batch_index]
                self._special_indices.discard(batch_index)
                self._free.append(batch_index)
        for start in plan.starts:
            batch_index = self._free.pop()
            self.batch_index_of[start.seq_id] = batch_index
            self.start_of[batch_index] = start
            self.token_ids[batch_index, : len(start.token_ids)] = start.token_ids
            if not _is_plain(start.params):
                self._special_indices.add(batch_index)
            for group, blocks in enumerate(start.block_ids):
                self._num_blocks[group][batch_index] = 0
                self._append(group, batch_index, blocks)
        for seq_id, added in zip(plan.seq_ids, plan.new_block_ids, strict=True):
            if added:
                for group, blocks in enumerate(added):
                    self._append(group, self.batch_index_of[seq_id], blocks)
        for row, draft in enumerate(plan.draft_token_ids):
            end = plan.num_computed[row] + plan.num_tokens[row]
            self.write_drafts(self.batch_index_of[plan.seq_ids[row]], end - len(draft), draft)

    def write_drafts(self, batch_index: int, start: int, token_ids: list[int]) -> None:
        """Put tokens that are not verified behind a sequence's first `start` ones."""
        self.token_ids[batch_index, start : start + len(token_ids)] = token_ids

    def _append(self, group: int, batch_index: int, blocks: list[int]) -> None:
        count = self._num_blocks[group][batch_index]
        self._block_table[group][batch_index, count : count + len(blocks)] = blocks
        size = self._groups[group].block_size
        self._first_slot[group][batch_index, count : count + len(blocks)] = [
            b * size for b in blocks
        ]
        self._num_blocks[group][batch_index] = count + len(blocks)

    def inputs(self, plan: StepPlan) -> StepInputs:
        """The step's arrays.

        Between two steps the caches are cold, and every array operation costs microseconds: they
        are few.
        """
        batch_indices = self.batch_indices(plan)
        num_computed = np.array(plan.num_computed, np.int64)
        num_rows = len(plan.seq_ids)
        if sum(plan.num_tokens) == num_rows:  # decode only: one token a row
            batch_index_of_token, positions = batch_indices, num_computed
            query_start = self._one_each[: num_rows + 1]
            seq_lens = [n + 1 for n in plan.num_computed]
        else:
            num_tokens = np.array(plan.num_tokens, np.int64)
            query_start = np.zeros(num_rows + 1, np.int32)
            np.cumsum(num_tokens, out=query_start[1:])
            batch_index_of_token = np.repeat(batch_indices, num_tokens)
            positions = np.arange(len(batch_index_of_token)) + np.repeat(
                num_computed - query_start[:-1], num_tokens
            )
            seq_lens = (num_computed + num_tokens).tolist()
        longest, groups = max(seq_lens), range(self._num_model_groups)
        return StepInputs(
            batch_indices,
            batch_index_of_token,
            positions,
            query_start,
            np.array(seq_lens, np.int32),
            query_start.tolist(),
            seq_lens,
            [self.slots(g, batch_index_of_token, positions) for g in groups],
            [self.blocks(g, batch_indices, longest) for g in groups],
        )

    def tokens_at(self, inputs: StepInputs) -> I64:
        """[T]: the step's tokens. Those that earlier steps sampled are there: `append` has put them
        in."""
        return self.token_ids[inputs.batch_index_of_token, inputs.positions].astype(np.int64)

    def slots(self, group: int, batch_indices: I64, positions: I64) -> I64:
        """Of the tokens at these positions of these batch rows, in blocks of a group; any shape,
        broadcast."""
        size = self._groups[group].block_size
        column = positions // size
        return self._first_slot[group][batch_indices, column] + (positions - column * size)

    def blocks(
        self, group: int, batch_indices: I64, longest: int, skipped: list[int] | None = None
    ) -> I32:
        """i32[B, max_blocks]: the blocks of these batch rows, as many as `longest` tokens take.
        `skipped`: per row, how many tokens stand before the first of them, in whole blocks."""
        table: I32 = self._block_table[group]
        size = self._groups[group].block_size
        if skipped is None or not any(skipped):
            return table[batch_indices, : -(-longest // size)]
        columns = np.array(skipped)[:, None] // size + np.arange(-(-longest // size))
        blocks: I32 = table[batch_indices[:, None], np.minimum(columns, table.shape[1] - 1)]
        return blocks

    def blocks_of(self, group: int, batch_index: int) -> I32:
        """A view of the blocks of one batch row, and of what is behind them."""
        blocks: I32 = self._block_table[group][batch_index]
        return blocks

    def batch_indices(self, plan: StepPlan) -> I64:
        """[B], of a plan that was taken in. Most steps have the rows of the step before."""
        if plan.seq_ids != self._row_seq_ids or plan.starts:
            self._row_seq_ids = plan.seq_ids
            self._row_batch_indices = np.array(
                [self.batch_index_of[i] for i in plan.seq_ids], np.int64
            )
        return self._row_batch_indices

    def append(
        self, batch_indices: I64, lengths: npt.NDArray[np.integer[Any]], token_ids: list[int]
    ) -> None:
        """Add the tokens sampled for these batch rows, one each, after the `lengths` tokens that
        they have."""
        self.token_ids[batch_indices, lengths] = np.array(token_ids, np.int32)

    def is_plain(self, batch_indices: I64) -> bool:
        """All are sampled greedily from the raw logits, and nothing is asked about them or about
        the prompts'."""
        return not self._special_indices or self._special_indices.isdisjoint(batch_indices.tolist())


def _is_plain(p: SamplingParams) -> bool:
    asks = p.logprobs is not None or p.prompt_logprobs is not None
    return p.greedy and not (p.penalized or p.logit_bias or p.min_tokens or asks)
