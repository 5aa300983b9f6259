"""Compute attention one token at a time: slow, short, and independent of the rest of the batch.

Symbols: T tokens in the step, Hq query heads, Hkv key/value heads, D head size. Query head h reads
KV head h // (Hq / Hkv).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.interfaces.attention import AttentionBatch, AttentionLayer, KVCacheSpec

Cache = tuple[Tensor, Tensor]
"""Keys and values of one layer, each `[num_blocks, block_size, Hkv, D]`. The layout is private to
this package."""


@dataclass(frozen=True)
class Plan:
    """Data that is computed once per step, for all layers of a KV group."""

    slot_mapping: Tensor
    """i64[T]: slot of each token's key and value."""
    seen: list[Tensor]
    """Per token: the slots of all tokens that it attends to, itself included."""


class MyPluginAttention:
    """An `AttentionBackend`; one object per engine. It has no state between steps."""

    def allocate_cache(self, spec: KVCacheSpec) -> Cache:
        shape = (spec.num_blocks, spec.block_size, spec.num_kv_heads, spec.head_size)
        dtype = getattr(torch, spec.dtype)
        return torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)

    def plan(self, batch: AttentionBatch, layers: list[AttentionLayer], block_size: int) -> Plan:
        window = layers[0].window  # the layers of a group share it
        seen = []
        for row in range(batch.num_seqs):
            start, end = batch.host_query_start[row : row + 2]
            for token in range(start, end):
                position = batch.host_seq_lens[row] - (end - token)
                first = 0 if window is None else max(0, position - window + 1)
                positions = torch.arange(first, position + 1)
                # Entries of the table outside these positions are undefined: never follow them.
                blocks = batch.block_table[row, positions // block_size].long()
                seen.append(blocks * block_size + positions % block_size)
        # The batch's buffers are reused in the next step, so the slots are copied.
        return Plan(batch.slot_mapping.clone(), seen)

    def run(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: Cache,
        plan: Plan,
        out: Tensor,
    ) -> None:
        keys, values = (part.flatten(0, 1) for part in cache)  # [slots, Hkv, D], views of the cache
        # Everything is written before anything is read, because rows of a step may share blocks.
        keys[plan.slot_mapping], values[plan.slot_mapping] = k.to(keys.dtype), v.to(values.dtype)
        for token, slots in enumerate(plan.seen):
            out[token] = attend(layer, q[token].float(), keys[slots].float(), values[slots].float())

    def export_kv(self, cache: Cache, block_ids: list[int], out: Cache | None = None) -> Cache:
        keys, values = cache[0][block_ids], cache[1][block_ids]
        return (keys, values) if out is None else (out[0].copy_(keys), out[1].copy_(values))

    def import_kv(self, cache: Cache, block_ids: list[int], keys: Tensor, values: Tensor) -> None:
        cache[0][block_ids], cache[1][block_ids] = keys, values


def attend(layer: AttentionLayer, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Compute one token in float32: `q [Hq, D]` over `keys, values [S, Hkv, D]` → `[Hq, D]`."""
    queries = q.view(layer.num_kv_heads, -1, layer.head_size)  # [Hkv, Hq / Hkv, D]
    logits = torch.einsum("hgd,shd->hgs", queries, keys) * layer.scale
    weights = logits.softmax(-1)  # subtracts the maximum, so that large logits do not overflow
    return torch.einsum("hgs,shd->hgd", weights, values).flatten(0, 1)
