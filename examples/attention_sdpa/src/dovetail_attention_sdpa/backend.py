"""Gather the keys and values of each sequence from its blocks, and compute attention with torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dovetail.interfaces.attention import AttentionBatch, AttentionLayer, KVCacheSpec

Cache = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SdpaPlan:
    """Each row has its tokens in the step, the slots that it may attend to, and a mask
    `bool[queries, slots]` (None: all slots)."""

    slot_mapping: Tensor
    rows: list[tuple[slice, Tensor, Tensor | None]]


class SdpaAttention:
    """An `AttentionBackend` with the canonical cache layout."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)

    def allocate_cache(self, spec: KVCacheSpec) -> Cache:
        shape = (spec.num_blocks, spec.block_size, spec.num_kv_heads, spec.head_size)
        dtype = getattr(torch, spec.dtype)
        return torch.zeros(shape, dtype=dtype, device=self._device), torch.zeros(
            shape, dtype=dtype, device=self._device
        )

    def plan(
        self, batch: AttentionBatch, layers: list[AttentionLayer], block_size: int
    ) -> SdpaPlan:
        window = layers[0].window  # the layers of a group share it
        rows = []
        for b, length in enumerate(batch.host_seq_lens):
            start, end = batch.host_query_start[b : b + 2]
            first_query = length - (end - start)
            # Blocks entirely before the window may belong to another sequence and must not be read.
            first = 0 if window is None else max(0, first_query - window + 1)
            positions = torch.arange(first, length, device=self._device)
            slots = (
                batch.block_table[b, positions // block_size].long() * block_size
                + positions % block_size
            )
            queries = torch.arange(first_query, length, device=self._device)[:, None]
            mask = positions <= queries
            if window is not None:
                mask &= positions > queries - window
            rows.append((slice(start, end), slots, None if mask.all() else mask))
        return SdpaPlan(batch.slot_mapping, rows)

    def run(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: Cache,
        plan: SdpaPlan,
        out: Tensor,
    ) -> None:
        keys, values = (c.flatten(0, 1) for c in cache)  # [slots, Hkv, D]
        keys[plan.slot_mapping], values[plan.slot_mapping] = k.to(keys.dtype), v.to(values.dtype)
        for tokens, slots, mask in plan.rows:
            seen = (x[slots].transpose(0, 1).to(q.dtype) for x in (keys, values))  # [Hkv, slots, D]
            heads = scaled_dot_product_attention(
                q[tokens].transpose(0, 1), *seen, attn_mask=mask, scale=layer.scale, enable_gqa=True
            )
            out[tokens] = heads.transpose(0, 1)

    def export_kv(self, cache: Cache, block_ids: list[int]) -> tuple[Tensor, Tensor]:
        return cache[0][block_ids], cache[1][block_ids]

    def import_kv(self, cache: Cache, block_ids: list[int], keys: Any, values: Any) -> None:
        cache[0][block_ids], cache[1][block_ids] = keys, values
