"""A draft model in the worker: k small steps, all drafting rows at once, before the step that
verifies.

One rule: the draft model has computed some of a sequence's first tokens, and what it lacks it
computes when it is asked to draft. The prompt, tokens that were sampled while nobody drafted, and
the last draft after all were accepted are this one rule; so a draft model that is not asked costs
nothing. It samples as the model does, with the noise and the parameters of the row.

A draft model that has rested for long is not worth all that it missed: its context then begins
anew, with the last tokens.

Its KV lies in blocks of a group of its own, which sequences share as they do the model's. A block
that it has computed as a whole is noted, so that whoever else has it need not compute it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dovetail.interfaces.architecture import Model
from dovetail.interfaces.attention import AttentionBackend, AttentionBatch
from dovetail.types import DRAFTED_BY_WORKER, KVGroup, StepPlan
from dovetail_worker_torch.runner.batch import I64, SequenceTable
from dovetail_worker_torch.runner.step_attention import StepAttention
from dovetail_worker_torch.sampling.backends import SamplerBackend
from dovetail_worker_torch.sampling.sampler import SamplingRows, sample

MAX_MISSED, NEW_CONTEXT = 128, 64
"""Tokens: a draft model that has missed more than so many begins anew with so many (and up to a
block more)."""
DRAFT = "draft"
"""Kind of the draft model's KV group."""


def draft_group(model: Model, first_layer: int, block_size: int, itemsize: int) -> KVGroup:
    """All layers in one group, numbered after the model's. It has no window even if they have: the
    draft model may lag behind, and then needs blocks that the model no longer sees."""
    per_token = sum(2 * m.num_kv_heads * m.head_size * itemsize for m in model.attention_layers)
    layers = [first_layer + m.index for m in model.attention_layers]
    return KVGroup(layers, DRAFT, block_size, per_token * block_size)


class DraftRunner:
    """The draft model, its cache, and what it has computed. Not thread-safe; called in torch's
    inference mode."""

    def __init__(
        self,
        model: Model,
        group: KVGroup,
        num_blocks: int,
        backend: AttentionBackend,
        caches: Mapping[int, object],
        table: SequenceTable,
        device: torch.device,
        sampler: SamplerBackend,
        provider_names: Mapping[str, str],
        max_num_tokens: int,
    ) -> None:
        """`group` is the last one of `table`, with the draft model's own numbers of layers, by
        which `caches` are."""
        self._model, self._backend, self._table, self._device, self._sampler = (
            model,
            backend,
            table,
            device,
            sampler,
        )
        self._block_size, self._max_num_tokens = group.block_size, max_num_tokens
        self._attend = StepAttention(
            model.attention_layers, [group], [backend], dict(caches), provider_names
        )
        self._num_computed = [0] * table.max_num_seqs
        """By batch row: of the sequence's first tokens, as they are known."""
        self._num_noted = [0] * table.max_num_seqs
        """By batch row: blocks of it that are in `_is_whole`."""
        self._num_skipped = [0] * table.max_num_seqs
        """By batch row: tokens before the draft model's context, in whole blocks. What it computes
        then is not for others."""
        self._is_whole = np.zeros(num_blocks, np.bool_)
        """By block: computed as a whole, for the tokens that the model's blocks of that place
        hold."""
        self._whole_on_host: set[int] = set()

    def update(self, plan: StepPlan) -> None:
        """Take in a plan's started sequences and new blocks; after the table has."""
        for op in plan.block_ops:
            if op.group == self._table.draft_group and op.kind == "out":
                (
                    self._whole_on_host.add
                    if self._is_whole[op.src]
                    else self._whole_on_host.discard
                )(op.dst)
        for start in plan.starts:
            batch_index = self._table.batch_index_of[start.seq_id]
            self._num_computed[batch_index] = self._num_noted[batch_index] = self._num_skipped[
                batch_index
            ] = 0
        for added in plan.new_block_ids:
            if added:
                self._is_whole[added[self._table.draft_group]] = False
        for op in plan.block_ops:
            if op.group == self._table.draft_group and op.kind != "out":
                self._is_whole[op.dst] = (
                    self._is_whole[op.src] if op.kind == "copy" else op.src in self._whole_on_host
                )

    def draft(self, plan: StepPlan) -> list[list[int]]:
        """The plan's drafts, with tokens for those that are left to the worker; they are in the
        table, too."""
        left = [
            r
            for r, draft in enumerate(plan.draft_token_ids)
            if draft and draft[0] == DRAFTED_BY_WORKER
        ]
        if not left:
            return plan.draft_token_ids
        # Those that draft most come first, so that the rows of every small step are a beginning of
        # the list.
        left.sort(key=lambda r: -len(plan.draft_token_ids[r]))
        counts = [len(plan.draft_token_ids[r]) for r in left]
        known = [
            plan.num_computed[r] + plan.num_tokens[r] - k for r, k in zip(left, counts, strict=True)
        ]
        batch_indices = [self._table.batch_index_of[plan.seq_ids[r]] for r in left]
        drafted = self._draft(batch_indices, known, counts)
        drafts = list(plan.draft_token_ids)
        for r, draft in zip(left, drafted, strict=True):
            drafts[r] = draft
        return drafts

    def verified(self, plan: StepPlan, sampled: list[list[int]]) -> None:
        """Tokens after the first draft that was not accepted are not the sequence's."""
        for row, draft in enumerate(plan.draft_token_ids):
            if draft and draft[0] == DRAFTED_BY_WORKER:
                batch_index = self._table.batch_index_of[plan.seq_ids[row]]
                known = plan.num_computed[row] + plan.num_tokens[row] - len(draft)
                self._num_computed[batch_index] = min(
                    self._num_computed[batch_index], known + max(0, len(sampled[row]) - 1)
                )

    def _draft(
        self, batch_indices: list[int], known: list[int], counts: list[int]
    ) -> list[list[int]]:
        """`counts` tokens (descending) after the `known` ones of each batch row."""
        table, at, lengths = (
            self._table,
            np.array(batch_indices, np.int64),
            np.array(known, np.int64),
        )
        is_plain = table.is_plain(at)
        tokens = self._draw(self._catch_up(batch_indices, at, known), at, lengths, is_plain)
        drafted = [[token] for token in tokens]
        if counts[0] > 1:
            self._go_on(drafted, at, lengths, known, counts, is_plain)
        for batch_index, length, draft in zip(batch_indices, known, drafted, strict=True):
            table.write_drafts(batch_index, length, draft)
            self._num_computed[batch_index] = length + len(draft) - 1
        return drafted

    def _go_on(
        self,
        drafted: list[list[int]],
        at: I64,
        lengths: I64,
        known: list[int],
        counts: list[int],
        is_plain: bool,
    ) -> None:
        """Draft the second and later tokens: each step one for every row that wants more."""
        table, num_steps, num_rows = self._table, counts[0] - 1, len(known)
        skipped = [self._num_skipped[batch_index] for batch_index in at.tolist()]
        seen = [length - skip for length, skip in zip(known, skipped, strict=True)]
        # The inputs of all steps, made at once. Rows that draft less have some that are not looked
        # at.
        places = np.minimum(lengths + np.arange(num_steps)[:, None], table.max_len)
        positions = self._to_device(places).unbind()
        slots = self._to_device(table.slots(table.draft_group, at, places)).unbind()
        seq_lens = self._to_device(
            (np.array(seen) + np.arange(1, num_steps + 1)[:, None]).astype(np.int32)
        ).unbind()
        blocks = self._to_device(
            table.blocks(table.draft_group, at, max(seen) + num_steps, skipped)
        )
        host_starts = list(range(num_rows + 1))
        starts = self._to_device(np.array(host_starts, np.int32))
        for step in range(num_steps):
            tokens = [draft[-1] for draft in drafted[:num_rows]]
            if not is_plain:  # penalties look at them
                table.append(at[:num_rows], lengths[:num_rows] + step, tokens)
            while counts[num_rows - 1] < step + 2:
                num_rows -= 1
            n, input_ids = num_rows, self._to_device(np.array(tokens[:num_rows], np.int64))
            lens = [length + step + 1 for length in seen[:n]]
            if n == len(known):
                self._plan(starts, seq_lens[step], blocks, slots[step], host_starts, lens)
                hidden = self._model.forward(input_ids, positions[step], self._attend)
            else:
                self._plan(
                    starts[: n + 1],
                    seq_lens[step][:n],
                    blocks[:n],
                    slots[step][:n],
                    host_starts[: n + 1],
                    lens,
                )
                hidden = self._model.forward(input_ids, positions[step][:n], self._attend)
            tokens = self._draw(
                self._model.logits(hidden), at[:n], lengths[:n] + (step + 1), is_plain
            )
            for draft, token in zip(drafted, tokens, strict=False):
                draft.append(token)

    def _catch_up(self, batch_indices: list[int], at: I64, known: list[int]) -> Tensor:
        """Compute what is lacking of the `known` tokens. Logits after the last of them: f32[B,
        V]."""
        begins = [
            self._begin(batch_index, length)
            for batch_index, length in zip(batch_indices, known, strict=True)
        ]
        while sum(known) - sum(begins) > self._max_num_tokens:
            # More than a step takes goes ahead, but for the last tokens, after which is sampled.
            ends, room = list(begins), self._max_num_tokens
            for i, length in enumerate(known):
                ends[i] += min(length - 1 - begins[i], room)
                room -= ends[i] - begins[i]
            ahead = [i for i, end in enumerate(ends) if end > begins[i]]
            self._compute(at[ahead], [begins[i] for i in ahead], [ends[i] for i in ahead])
            begins = ends
        hidden = self._compute(at, begins, known)
        for batch_index, length in zip(batch_indices, known, strict=True):
            whole = length // self._block_size
            if whole > self._num_noted[batch_index] and not self._num_skipped[batch_index]:
                blocks = self._table.blocks_of(self._table.draft_group, batch_index)
                self._is_whole[blocks[self._num_noted[batch_index] : whole]] = True
                self._num_noted[batch_index] = whole
        if len(hidden) != len(batch_indices):
            last = (
                np.cumsum([length - begin for begin, length in zip(begins, known, strict=True)]) - 1
            )
            hidden = hidden[-1:] if len(batch_indices) == 1 else hidden[self._to_device(last)]
        logits: Tensor = self._model.logits(hidden)
        return logits

    def _begin(self, batch_index: int, known: int) -> int:
        """The first of the sequence's `known` tokens that is to be computed; the last one is, for
        its logits."""
        computed = self._num_computed[batch_index]
        if computed and known - computed > MAX_MISSED:
            return self._begin_anew(batch_index, known)
        if known - computed > self._block_size and not self._num_skipped[batch_index]:
            # Others may have computed blocks that it shares.
            blocks = self._table.blocks_of(self._table.draft_group, batch_index)[
                : known // self._block_size
            ]
            whole = self._is_whole[blocks]
            computed = max(
                computed, self._block_size * (len(whole) if whole.all() else int(whole.argmin()))
            )
        return min(computed, known - 1)

    def _begin_anew(self, batch_index: int, known: int) -> int:
        begin = self._num_skipped[batch_index] = (
            (known - NEW_CONTEXT) // self._block_size * self._block_size
        )
        return begin

    def _compute(self, at: I64, begins: list[int], ends: list[int]) -> Tensor:
        """Tokens `begins` … `ends` - 1 of each batch row. Hidden states, `[T, H]`."""
        table, group = self._table, self._table.draft_group
        counts = [end - begin for begin, end in zip(begins, ends, strict=True)]
        host_starts = [0, *accumulate(counts)]
        if len(at) == 1:
            of_token, positions = at, np.arange(begins[0], ends[0])
        elif host_starts[-1] == len(at):
            of_token, positions = at, np.array(begins, np.int64)
        else:
            of_token = np.repeat(at, counts)
            positions = np.concatenate(
                [np.arange(begin, end) for begin, end in zip(begins, ends, strict=True)]
            )
        skipped = [self._num_skipped[batch_index] for batch_index in at.tolist()]
        seen = [end - skip for end, skip in zip(ends, skipped, strict=True)]
        self._plan(
            self._to_device(np.array(host_starts, np.int32)),
            self._to_device(np.array(seen, np.int32)),
            self._to_device(table.blocks(group, at, max(seen), skipped)),
            self._to_device(table.slots(group, of_token, positions)),
            host_starts,
            seen,
        )
        token_ids = table.token_ids[of_token, positions].astype(np.int64)
        hidden: Tensor = self._model.forward(
            self._to_device(token_ids), self._to_device(positions), self._attend
        )
        return hidden

    def _plan(
        self,
        starts: Tensor,
        seq_lens: Tensor,
        blocks: Tensor,
        slots: Tensor,
        host_starts: list[int],
        host_lens: list[int],
    ) -> None:
        num_rows, num_tokens = len(host_lens), host_starts[-1]
        longest = 1 if num_tokens == num_rows else max(b - a for a, b in pairwise(host_starts))
        batch = AttentionBatch(
            starts,
            seq_lens,
            blocks,
            slots,
            host_starts,
            host_lens,
            num_rows,
            num_tokens,
            longest,
            max(host_lens),
        )
        self._attend.plans[0] = self._backend.plan(
            batch, self._model.attention_layers, self._block_size
        )

    def _draw(self, logits: Tensor, batch_indices: I64, lengths: I64, is_plain: bool) -> list[int]:
        """As the model's tokens are sampled. Logits that are not numbers give some token, which
        will not be accepted."""
        if is_plain:
            return self._sampler.best(logits)[0]
        starts = [self._table.start_of[batch_index] for batch_index in batch_indices.tolist()]
        tokens = self._table.token_ids[batch_indices, : int(lengths.max())]
        return sample(logits, SamplingRows(starts, tokens, lengths), self._sampler)[0]

    def _to_device(self, array: npt.NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._device.type == "cpu" else tensor.to(self._device)
