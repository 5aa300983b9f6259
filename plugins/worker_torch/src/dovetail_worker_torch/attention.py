"""The reference attention: paged, ragged, in plain PyTorch. Slow, obviously right, and the same on
every device.

One idea: gather a sequence's visible keys and values into a contiguous tensor, then compute
softmax(q·k) v in float32. Every kernel is tested against the same contract as this file
(`dovetail_testing.attention`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.interfaces.attention import AttentionBatch, AttentionLayer, KVCacheSpec

Cache = tuple[Tensor, Tensor]
"""Keys and values of a layer, each `[num_blocks, block_size, Hkv, D]`."""

QUERIES_AT_A_TIME = 256
"""Bounds the logits of a long prefill: `[Hq, 256, S]` float32 instead of `[Hq, S, S]`."""


@dataclass(frozen=True)
class ReferencePlan:
    """A step as it was given: there is nothing to prepare."""

    batch: AttentionBatch
    block_size: int


class ReferenceAttention:
    """An `AttentionBackend` whose cache is in the canonical layout.

    Not batch invariant: a matrix product chooses its summation order by shape, so other rows can
    change the last bits.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)

    def allocate_cache(self, spec: KVCacheSpec) -> Cache:
        shape = (spec.num_blocks, spec.block_size, spec.num_kv_heads, spec.head_size)
        dtype = getattr(torch, spec.dtype)
        return torch.zeros(shape, dtype=dtype, device=self.device), torch.zeros(
            shape, dtype=dtype, device=self.device
        )

    def plan(
        self, batch: AttentionBatch, layers: list[AttentionLayer], block_size: int
    ) -> ReferencePlan:
        return ReferencePlan(batch, block_size)

    def run(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: Cache,
        plan: ReferencePlan,
        out: Tensor,
    ) -> None:
        batch, num_tokens = plan.batch, plan.batch.num_tokens
        keys, values = (c.flatten(0, 1) for c in cache)  # [slots, Hkv, D]
        slots = batch.slot_mapping[:num_tokens]
        scales = (None, None) if layer.kv_scales is None else layer.kv_scales.unbind()
        for cached, new, scale in zip((keys, values), (k, v), scales, strict=True):
            cached[slots] = stored(new[:num_tokens], cached.dtype, scale)
        for b in range(batch.num_seqs):
            start, end = batch.host_query_start[b], batch.host_query_start[b + 1]
            first_position = batch.host_seq_lens[b] - (end - start)  # of the row's first query
            for i in range(start, end, QUERIES_AT_A_TIME):
                j = min(i + QUERIES_AT_A_TIME, end)
                positions = range(first_position + i - start, first_position + j - start)
                visible = _visible(positions, layer.window)
                where = _slots(batch.block_table[b], visible, plan.block_size)
                seen_keys, seen_values = (
                    read(keys[where], scales[0]),
                    read(values[where], scales[1]),
                )
                out[i:j] = attend(layer, q[i:j], seen_keys, seen_values, positions, visible)

    def export_kv(
        self, cache: Cache, block_ids: list[int], out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        index = torch.tensor(block_ids, dtype=torch.int64, device=self.device)
        keys, values = cache[0][index], cache[1][index]
        return (keys, values) if out is None else (out[0].copy_(keys), out[1].copy_(values))

    def import_kv(self, cache: Cache, block_ids: list[int], keys: Tensor, values: Tensor) -> None:
        index = torch.tensor(block_ids, dtype=torch.int64, device=self.device)
        for own, given in zip(cache, (keys, values), strict=True):
            own[index] = given.to(device=self.device, dtype=own.dtype)


def stored(x: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """Keys or values as a cache of `dtype` holds them (`AttentionLayer.kv_scales`)."""
    if dtype.itemsize > 1:
        return x.to(dtype)
    scaled = x.float() if scale is None else x.float() / scale
    if dtype == torch.int8:
        return scaled.nan_to_num(nan=0.0).round().clamp(-127, 127).to(dtype)
    return scaled.clamp(-448, 448).to(dtype)


def read(x: Tensor, scale: Tensor | None) -> Tensor:
    """What stored keys or values stand for, in float32."""
    return x.float() if scale is None else x.float() * scale


def attend(
    layer: AttentionLayer, q: Tensor, keys: Tensor, values: Tensor, positions: range, visible: range
) -> Tensor:
    """Attention of one sequence's queries over its gathered keys and values, in float32.

    q: `[Q, Hq, D]` at `positions`; keys, values: `[S, Hkv, D]` at the positions `visible`. Returns
    `[Q, Hq, D]` in q's dtype.
    """
    num_queries, num_heads, head_size = q.shape
    num_kv_heads = keys.shape[1]
    group = num_heads // num_kv_heads  # query head h reads key/value head h // group
    queries = (
        q.float().view(num_queries, num_kv_heads, group, head_size).permute(1, 2, 0, 3)
    )  # [Hkv, group, Q, D]
    k, v = (x.float().transpose(0, 1).unsqueeze(1) for x in (keys, values))  # [Hkv, 1, S, D]

    logits = (queries @ k.transpose(-1, -2)) * layer.scale  # [Hkv, group, Q, S]
    if layer.logit_soft_cap is not None:
        logits = layer.logit_soft_cap * torch.tanh(logits / layer.logit_soft_cap)
    query_at = torch.arange(positions.start, positions.stop, device=q.device)[:, None]
    key_at = torch.arange(visible.start, visible.stop, device=q.device)[None, :]
    hidden = key_at > query_at
    if layer.window is not None:
        hidden |= key_at <= query_at - layer.window
    logits = logits.masked_fill(hidden, float("-inf"))

    top = logits.amax(-1, keepdim=True)  # finite: a token sees at least itself
    if layer.sinks is not None:
        sinks = layer.sinks.float().view(num_kv_heads, group, 1, 1)
        top = torch.maximum(top, sinks)
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True)
    if layer.sinks is not None:
        total = total + torch.exp(sinks - top)
    result = (weights / total) @ v  # [Hkv, group, Q, D]
    return result.permute(2, 0, 1, 3).reshape(num_queries, num_heads, head_size).to(q.dtype)


def _visible(positions: range, window: int | None) -> range:
    """The positions that at least one of these queries sees."""
    first = 0 if window is None else max(0, positions.start - window + 1)
    return range(first, positions.stop)


def _slots(table: Tensor, visible: range, block_size: int) -> Tensor:
    """i64[len(visible)]: slots of those positions. Reads no table entry outside them: the others
    are undefined."""
    first, last = visible.start // block_size, (visible.stop - 1) // block_size
    blocks = table[first : last + 1].long() * block_size
    slots = (blocks[:, None] + torch.arange(block_size, device=table.device)).flatten()
    skip = visible.start - first * block_size
    return slots[skip : skip + len(visible)]
