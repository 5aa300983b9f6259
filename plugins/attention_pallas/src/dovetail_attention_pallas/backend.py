"""Implement the attention contract with the Pallas kernel. torch tensors are converted by DLPack;
the cache consists of JAX arrays."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import torch
from torch import Tensor

from dovetail.errors import PluginError
from dovetail.interfaces.attention import AttentionBatch, AttentionLayer, KVCacheSpec
from dovetail_attention_pallas.kernel import Cache, attend, write
from dovetail_attention_pallas.schedule import Schedule, make_schedule, padded


@dataclass
class OwnedCache:
    """The cache of a layer. JAX arrays are immutable: each step returns new ones, in the memory
    that the old ones donated.

    JAX owns the cache, because memory that was imported from torch cannot be donated.
    """

    arrays: Cache


@dataclass(frozen=True)
class Plan:
    """The work of a step by window. It is empty if the step has no tokens."""

    num_tokens: int
    by_window: dict[int | None, Schedule]


class PallasAttention:
    """An `AttentionBackend` for torch tensors on the CPU, where the kernel is interpreted."""

    def __init__(self) -> None:
        self._device = jax.devices("cpu")[0]

    def allocate_cache(self, spec: KVCacheSpec) -> OwnedCache:
        shape = (spec.num_blocks, spec.num_kv_heads, spec.block_size, spec.head_size)
        return OwnedCache(
            Cache(*(jnp.zeros(shape, spec.dtype, device=self._device) for _ in range(2)))
        )

    def plan(self, batch: AttentionBatch, layers: list[AttentionLayer], block_size: int) -> Plan:
        num_tokens = batch.host_query_start[batch.num_seqs]
        if num_tokens == 0:
            return Plan(0, {})
        lengths = (
            batch.host_query_start[: batch.num_seqs + 1],
            batch.host_seq_lens[: batch.num_seqs],
        )
        table, slots = batch.block_table.numpy(), batch.slot_mapping.numpy()
        windows = {layer.window for layer in layers}
        schedules = {w: make_schedule(*lengths, table, slots, block_size, w) for w in windows}
        return Plan(num_tokens, {w: jax.device_put(s, self._device) for w, s in schedules.items()})

    def run(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: OwnedCache,
        plan: Plan,
        out: Tensor,
    ) -> None:
        n = plan.num_tokens
        if n == 0:
            return
        if min(len(q), len(k), len(v), len(out)) < n:
            raise PluginError(
                f"attention: q, k, v and out must hold the step's {n} tokens; they hold "
                f"{len(q)}, {len(k)}, {len(v)} and {len(out)}"
            )
        attended, cache.arrays = _step(
            *(_to_jax(x, n) for x in (q, k, v)),
            cache.arrays,
            plan.by_window[layer.window],
            scale=layer.scale,
            soft_cap=layer.logit_soft_cap,
            sinks=(
                None
                if layer.sinks is None
                else jax.dlpack.from_dlpack(layer.sinks.float().contiguous())
            ),
        )
        out[:n] = _to_torch(attended)[:n]

    def export_kv(
        self, cache: OwnedCache, block_ids: list[int], out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        keys, values = (_to_torch(x)[block_ids].transpose(1, 2).contiguous() for x in cache.arrays)
        return (keys, values) if out is None else (out[0].copy_(keys), out[1].copy_(values))

    def import_kv(
        self, cache: OwnedCache, block_ids: list[int], keys: Tensor, values: Tensor
    ) -> None:
        given = (jax.dlpack.from_dlpack(x.contiguous()) for x in (keys, values))
        cache.arrays = _replace(cache.arrays, Cache(*given), jnp.array(block_ids))


@functools.partial(jax.jit, static_argnames=("scale", "soft_cap"), donate_argnames="cache")
def _step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: Cache,
    schedule: Schedule,
    *,
    scale: float,
    soft_cap: float | None,
    sinks: jax.Array | None,
) -> tuple[jax.Array, Cache]:
    """Compute `paged_attention` in interpreter mode. The interpreter copies its inputs, so it
    receives the blocks that the step reads instead of the cache. They are in reverse order, so that
    the kernel still looks up each block."""
    cache = write(k, v, cache, schedule)
    read = Cache(*(x[schedule.work_block[::-1]] for x in cache))
    there = schedule._replace(
        work_block=jnp.arange(len(schedule.work_block), dtype=jnp.int32)[::-1]
    )
    return (
        attend(q, read, there, scale=scale, soft_cap=soft_cap, sinks=sinks, interpret=True),
        cache,
    )


@functools.partial(jax.jit, donate_argnums=0)
def _replace(cache: Cache, given: Cache, block_ids: jax.Array) -> Cache:
    """Write blocks in the canonical layout `[n, block_size, Hkv, D]` to the cache."""
    return Cache(
        *(
            x.at[block_ids].set(new.swapaxes(1, 2).astype(x.dtype))
            for x, new in zip(cache, given, strict=True)
        )
    )


def _to_jax(x: Tensor, num_tokens: int) -> jax.Array:
    """Return the tokens of the step as a padded JAX array. This is a copy, because torch views may
    have strides, and padding limits the number of compiled shapes."""
    whole = x.new_zeros((padded(num_tokens), *x.shape[1:]))
    whole[:num_tokens] = x[:num_tokens]
    array: jax.Array = jax.dlpack.from_dlpack(whole)
    return array


def _to_torch(x: jax.Array) -> Tensor:
    """Wait for a JAX array and return a torch view of its memory. The view is valid until the array
    is donated, and must not be written to."""
    tensor: Tensor = torch.utils.dlpack.from_dlpack(x.block_until_ready())
    return tensor
