"""Implement paged attention in NumPy. The worker's tensors are torch tensors on the CPU; NumPy
arrays share their memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dovetail.interfaces.attention import AttentionBatch, AttentionLayer, KVCacheSpec

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Cache:
    """The cache of one layer."""

    keys: Array
    """[blocks, Hkv, D, block_size]"""
    values: Array
    """[blocks, Hkv, block_size, D]"""


@dataclass(frozen=True)
class Row:
    """One sequence of the step."""

    tokens: slice
    """The sequence's tokens in the step."""
    first_query: int
    """Position in the sequence of the first of these tokens."""
    first_seen: int
    """First position that any of these tokens attends to."""
    length: int
    blocks: Array
    """The blocks that hold positions `first_seen … length - 1`."""


@dataclass(frozen=True)
class Plan:
    rows: list[Row]
    slots: Array
    """i64[T]: the slot to which the key and value of each token are written."""


class NumpyAttention:
    def allocate_cache(self, spec: KVCacheSpec) -> Cache:
        shape, dtype = (spec.num_blocks, spec.num_kv_heads), np.dtype(spec.dtype)
        return Cache(
            np.zeros((*shape, spec.head_size, spec.block_size), dtype),
            np.zeros((*shape, spec.block_size, spec.head_size), dtype),
        )

    def plan(self, batch: AttentionBatch, layers: list[AttentionLayer], block_size: int) -> Plan:
        window = layers[0].window  # the layers of a group share it
        table, rows = batch.block_table.numpy(), []
        for b, length in enumerate(batch.host_seq_lens):
            start, end = batch.host_query_start[b : b + 2]
            first_query = length - (end - start)
            first_seen = 0 if window is None else max(0, first_query - window + 1)
            blocks = table[b, first_seen // block_size : (length - 1) // block_size + 1].copy()
            rows.append(Row(slice(start, end), first_query, first_seen, length, blocks))
        return Plan(rows, batch.slot_mapping.numpy().copy())

    def run(
        self, layer: AttentionLayer, q: Any, k: Any, v: Any, cache: Cache, plan: Plan, out: Any
    ) -> None:
        block_size = cache.values.shape[2]
        blocks, offsets = plan.slots // block_size, plan.slots % block_size
        # All keys and values are written before any is read, because rows may share blocks.
        cache.keys[blocks, :, :, offsets] = k.numpy()
        cache.values[blocks, :, offsets] = v.numpy()
        queries, result = q.numpy(), out.numpy()
        for row in plan.rows:
            result[row.tokens] = _attend(layer, queries[row.tokens], cache, row, block_size)

    def export_kv(self, cache: Cache, block_ids: list[int]) -> tuple[Any, Any]:
        keys, values = (
            cache.keys[block_ids].transpose(0, 3, 1, 2),
            cache.values[block_ids].transpose(0, 2, 1, 3),
        )
        return torch.from_numpy(keys.copy()), torch.from_numpy(values.copy())

    def import_kv(self, cache: Cache, block_ids: list[int], keys: Any, values: Any) -> None:
        cache.keys[block_ids] = keys.numpy().transpose(0, 2, 3, 1)
        cache.values[block_ids] = values.numpy().transpose(0, 2, 1, 3)


def _attend(layer: AttentionLayer, q: Array, cache: Cache, row: Row, block_size: int) -> Array:
    """Compute softmax(scale · q·k) v in float32: q `[n, Hq, D]` → `[n, Hq, D]`."""
    group = layer.num_heads // layer.num_kv_heads
    skip = row.first_seen % block_size
    # Slots outside this range are undefined.
    seen = slice(skip, skip + row.length - row.first_seen)
    keys = (
        cache.keys[row.blocks]
        .transpose(1, 2, 0, 3)
        .reshape(layer.num_kv_heads, layer.head_size, -1)[..., seen]
    )
    values = (
        cache.values[row.blocks]
        .transpose(1, 0, 2, 3)
        .reshape(layer.num_kv_heads, -1, layer.head_size)[:, seen]
    )
    queries = (
        q.astype(np.float32)
        .reshape(len(q), layer.num_kv_heads, group, layer.head_size)
        .transpose(1, 2, 0, 3)
    )
    logits = (
        queries @ keys.astype(np.float32)[:, None] * np.float32(layer.scale)
    )  # [Hkv, group, n, seen]
    if layer.logit_soft_cap is not None:
        logits = layer.logit_soft_cap * np.tanh(logits / np.float32(layer.logit_soft_cap))
    query_at = np.arange(row.first_query, row.length)[:, None]
    key_at = np.arange(row.first_seen, row.length)
    hidden = key_at > query_at
    if layer.window is not None:
        hidden |= key_at <= query_at - layer.window
    logits = np.where(hidden, -np.inf, logits)
    top = logits.max(-1, keepdims=True)  # finite: a token attends at least to itself
    if layer.sinks is not None:
        sinks = layer.sinks.numpy().reshape(layer.num_kv_heads, group, 1, 1)
        top = np.maximum(top, sinks)
    weights = np.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    if layer.sinks is not None:
        total = total + np.exp(sinks - top)
    out: Array = (weights / total) @ values.astype(np.float32)[:, None]
    return out.transpose(2, 0, 1, 3).reshape(q.shape)
