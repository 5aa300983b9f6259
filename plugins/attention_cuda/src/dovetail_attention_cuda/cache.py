"""The KV cache of both providers.

The keys and the values of a layer are `[num_blocks, Hkv, block_size, D]` each, so that the part of
a block that belongs to one head is contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.errors import PluginError
from dovetail.interfaces.attention import AttentionBatch, AttentionLayer, KVCacheSpec

Cache = tuple[Tensor, Tensor]


def allocate(spec: KVCacheSpec, device: torch.device) -> Cache:
    shape = (spec.num_blocks, spec.num_kv_heads, spec.block_size, spec.head_size)
    dtype = getattr(torch, spec.dtype)
    return torch.zeros(shape, dtype=dtype, device=device), torch.zeros(
        shape, dtype=dtype, device=device
    )


def export_kv(
    cache: Cache, block_ids: list[int], out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Implement `AttentionBackend.export_kv`."""
    index = torch.tensor(block_ids, dtype=torch.int64, device=cache[0].device)
    keys, values = (x[index].transpose(1, 2).contiguous() for x in cache)
    return (keys, values) if out is None else (out[0].copy_(keys), out[1].copy_(values))


def import_kv(cache: Cache, block_ids: list[int], keys: Tensor, values: Tensor) -> None:
    """Implement `AttentionBackend.import_kv`."""
    index = torch.tensor(block_ids, dtype=torch.int64, device=cache[0].device)
    for own, given in zip(cache, (keys, values), strict=True):
        own[index] = given.to(device=own.device, dtype=own.dtype).transpose(1, 2)


def check(
    layer: AttentionLayer,
    batch: AttentionBatch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Cache,
    out: Tensor,
) -> None:
    """Raise `PluginError` if a tensor has a shape, dtype or stride that the kernels do not
    support."""
    n, heads, kv = (
        batch.num_tokens,
        (layer.num_heads, layer.head_size),
        (layer.num_kv_heads, layer.head_size),
    )
    if not (
        q.stride(2) == k.stride(2) == v.stride(2) == out.stride(2) == 1
        and k.dtype == v.dtype == out.dtype == q.dtype
    ):
        raise PluginError("attention: q, k, v and out must have one dtype and contiguous heads")
    if not (
        q.shape[0] >= n <= k.shape[0]
        and v.shape[0] >= n <= out.shape[0]
        and len(batch.slot_mapping) >= n
        and q.shape[1:] == out.shape[1:] == heads
        and k.shape[1:] == v.shape[1:] == kv
        and all((x.shape[1], x.shape[3]) == kv for x in cache)
    ):
        raise PluginError(
            "attention: q and out must be [T, Hq, D], k and v [T, Hkv, D], and the cache must be"
            " that of the planned layer"
        )
