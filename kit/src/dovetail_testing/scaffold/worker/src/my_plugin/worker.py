"""Do everything that touches the device. The rows of a step are laid end to end, the model runs
over them once, and each row that reaches the last known token of its sequence samples the next one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dovetail.interfaces.architecture import Model
from dovetail.interfaces.attention import (
    AttentionBackend,
    AttentionBatch,
    AttentionLayer,
    KVCacheSpec,
)
from dovetail.interfaces.worker import Progress
from dovetail.plugin.build_context import BuildContext
from dovetail.types import KVGroup, SequenceStart, StepPlan, StepResult
from my_plugin.layers import load_model
from my_plugin.sampler import logprobs_of, sample_token

MAX_MEMORY = 2**30
"""Maximum size of the KV cache in bytes if the engine config does not set `memory_gb`."""


@dataclass
class Known:
    """A sequence, as known from the plans so far."""

    start: SequenceStart
    tokens: list[int]
    tables: list[list[int]]
    """Blocks in order, per KV group."""


@dataclass
class Computed:
    """A step in flight: its logits are computed, its tokens may not be sampled yet."""

    plan: StepPlan
    logits: list[Tensor]
    """Logits per row, f32[tokens of the row, V]."""
    result: StepResult | None = None


class MyPluginWorker:
    """A `Worker`. Its life cycle is: load, kv_groups, kv_memory, allocate, warm_up, then submit and
    sample for each step, and close."""

    def __init__(self, context: BuildContext) -> None:
        self._context = context
        dtype = context.option("kv_cache", "dtype")
        self._kv_dtype = context.plan.dtype if dtype == "auto" else dtype
        self._known: dict[int, Known] = {}
        self._model: Model
        self._backends: list[AttentionBackend] = []
        """Backends per KV group."""
        self._caches: dict[int, object] = {}
        """Caches by layer."""

    def load(self, progress: Progress) -> None:
        plan = self._context.plan
        self._model = load_model(
            Path(plan.folder),
            self._context.build("architecture"),
            getattr(torch, plan.dtype),
            progress,
        )

    def kv_groups(self) -> list[KVGroup]:
        """Group layers with equal windows: they share a block numbering."""
        layers, groups = self._model.attention_layers, []
        size, block_size = (
            getattr(torch, self._kv_dtype).itemsize,
            self._context.option("kv_cache", "block_size"),
        )
        for window in dict.fromkeys(layer.window for layer in layers):
            members = [layer for layer in layers if layer.window == window]
            per_token = sum(
                2 * m.num_kv_heads * m.head_size * size for m in members
            )  # keys and values
            kind = "full" if window is None else "sliding"
            groups.append(
                KVGroup(
                    [m.index for m in members], kind, block_size, per_token * block_size, window
                )
            )
        return groups

    def kv_memory(self) -> int:
        size, fraction = (
            self._context.option("kv_cache", name) for name in ("memory_gb", "memory_fraction")
        )
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return int(size * 2**30) if size is not None else min(MAX_MEMORY, int(free * fraction))

    def allocate(self, num_blocks: list[int]) -> None:
        self._groups = self.kv_groups()
        self._backends = [self._context.build(f"attention.{group.kind}") for group in self._groups]
        for group, backend, count in zip(self._groups, self._backends, num_blocks, strict=True):
            for index in group.layers:
                layer = self._model.attention_layers[index]
                spec = KVCacheSpec(
                    count, group.block_size, layer.num_kv_heads, layer.head_size, self._kv_dtype
                )
                self._caches[index] = backend.allocate_cache(spec)

    def warm_up(self, progress: Progress) -> None:
        progress("warming up", 1, 1)  # nothing here is slow the first time

    def submit(self, plan: StepPlan) -> Computed:
        """Compute the step at once, so that a later step finds its tokens sampled; a plan that
        waits for masks is sampled by `sample`."""
        self._update(plan)
        with torch.inference_mode():
            step = Computed(plan, self._forward(plan))
            step.result = None if plan.masked else self._sample(step, {})
        return step

    def sample(self, handle: Computed, masks: dict[int, bytes] | None = None) -> StepResult:
        with torch.inference_mode():
            return handle.result or self._sample(handle, masks or {})

    def close(self) -> None:
        self._known.clear()
        self._caches.clear()
        self._backends.clear()

    def _update(self, plan: StepPlan) -> None:
        """Apply the plan's changes to sequences: only what changed since the last plan. An invalid
        plan changes nothing."""
        known = (set(self._known) - set(plan.released)) | {start.seq_id for start in plan.starts}
        if unknown := set(plan.seq_ids) - known:
            raise ValueError(
                f"step {plan.step_id} has rows of unknown sequences: {sorted(unknown)}"
            )
        for seq_id in plan.released:
            self._known.pop(seq_id, None)
        for start in plan.starts:
            self._known[start.seq_id] = Known(
                start, list(start.token_ids), [list(ids) for ids in start.block_ids]
            )
        for seq_id, added in zip(plan.seq_ids, plan.new_block_ids, strict=True):
            for table, blocks in zip(self._known[seq_id].tables, added, strict=bool(added)):
                table += blocks

    def _forward(self, plan: StepPlan) -> list[Tensor]:
        """Compute the logits of every row's tokens."""
        rows = [self._known[i] for i in plan.seq_ids]
        drafts = plan.draft_token_ids or [[] for _ in rows]
        spans = [
            range(first, first + n)
            for first, n in zip(plan.num_computed, plan.num_tokens, strict=True)
        ]
        tokens = [[*row.tokens, *draft] for row, draft in zip(rows, drafts, strict=True)]
        token_ids = torch.tensor([tokens[b][p] for b, span in enumerate(spans) for p in span])
        positions = torch.tensor([p for span in spans for p in span])
        plans: dict[int, tuple[AttentionBackend, AttentionLayer, object]] = {}
        for i, group in enumerate(self._groups):
            batch = batch_of([row.tables[i] for row in rows], spans, group.block_size)
            layers = [self._model.attention_layers[index] for index in group.layers]
            group_plan = self._backends[i].plan(batch, layers, group.block_size)
            plans |= {layer.index: (self._backends[i], layer, group_plan) for layer in layers}

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            backend, attention_layer, group_plan = plans[layer]
            out = torch.empty_like(q)
            backend.run(attention_layer, q, k, v, self._caches[layer], group_plan, out)
            return out

        hidden = self._model.forward(token_ids, positions, attend)
        return list(self._model.logits(hidden).split(plan.num_tokens))

    def _sample(self, step: Computed, masks: dict[int, bytes]) -> StepResult:
        plan = step.plan
        result = StepResult(plan.step_id, [[] for _ in plan.seq_ids])
        drafts = plan.draft_token_ids or [[] for _ in plan.seq_ids]
        asked = [self._known[i].start.params for i in plan.seq_ids]
        if any(p.logprobs is not None or p.prompt_logprobs is not None for p in asked):
            result.logprobs, result.prompt_logprobs = [[] for _ in asked], [[] for _ in asked]
        for b, (seq_id, logits) in enumerate(zip(plan.seq_ids, step.logits, strict=True)):
            row, params = self._known[seq_id], asked[b]
            if logits.isnan().any():
                result.failed[seq_id] = "the model's logits are not numbers (NaN)"
                continue
            if params.prompt_logprobs is not None:  # of prompt tokens that follow this row's tokens
                first = plan.num_computed[b] + 1
                following = row.tokens[
                    first : min(first + plan.num_tokens[b], row.start.num_prompt_tokens)
                ]
                for at, token in enumerate(following):
                    result.prompt_logprobs[b].append(
                        logprobs_of(logits[at], token, params.prompt_logprobs)
                    )
            # Draft tokens are verified here: the model's token is sampled as always, and a draft
            # token is accepted if it is equal.
            for at, draft in enumerate(
                [*drafts[b], None] if plan.samples[b] else [],
                plan.num_tokens[b] - len(drafts[b]) - 1,
            ):
                token = sample_token(logits[at], row.start, row.tokens, masks.get(seq_id))
                row.tokens.append(token)
                result.token_ids[b].append(token)
                if params.logprobs is not None:
                    result.logprobs[b].append(logprobs_of(logits[at], token, params.logprobs))
                if token != draft:
                    break
        return result


def batch_of(tables: list[list[int]], spans: list[range], block_size: int) -> AttentionBatch:
    """Build the batch of one step in one KV group, from block tables and token positions."""
    starts = [0]
    for span in spans:
        starts.append(starts[-1] + len(span))
    width = max(map(len, tables))
    slots = [
        t[p // block_size] * block_size + p % block_size
        for t, span in zip(tables, spans, strict=True)
        for p in span
    ]
    lengths = [span.stop for span in spans]
    return AttentionBatch(
        query_start=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_table=torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32),
        slot_mapping=torch.tensor(slots),
        host_query_start=starts,
        host_seq_lens=lengths,
        num_seqs=len(spans),
        num_tokens=starts[-1],
        max_query_len=max(map(len, spans)),
        max_seq_len=max(lengths),
    )
