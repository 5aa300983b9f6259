"""The kernel behind the attention contract: torch's tensors come and go by DLPack, the cache stays
JAX's."""

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
    """A layer's cache. JAX's arrays never change: each step gives new ones, in the memory that the
    old ones donated.

    That is why JAX owns it: memory that came from torch can be read, and not donated.
    """

    arrays: Cache


@dataclass(frozen=True)
class Plan:
    """A step's work, by window; nothing where the step has no token."""

    num_tokens: int
    by_window: dict[int | None, Schedule]


class PallasAttention:
    """An `AttentionBackend`. Its arrays are torch's, on the CPU, where the kernel is
    interpreted."""

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
            *(_lent(x, n) for x in (q, k, v)),
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
        out[:n] = _borrowed(attended)[:n]

    def export_kv(
        self, cache: OwnedCache, block_ids: list[int], out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        keys, values = (_borrowed(x)[block_ids].transpose(1, 2).contiguous() for x in cache.arrays)
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
    """`paged_attention`, interpreted. The interpreter copies what it is given, so it gets the
    blocks that the step reads, not the cache; in reverse, so that the kernel still has to look each
    of them up."""
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
    """Blocks in the canonical layout `[n, block_size, Hkv, D]` into the cache's own."""
    return Cache(
        *(
            x.at[block_ids].set(new.swapaxes(1, 2).astype(x.dtype))
            for x, new in zip(cache, given, strict=True)
        )
    )


def _lent(x: Tensor, num_tokens: int) -> jax.Array:
    """The step's tokens as JAX's, padded. A copy: torch's views may have strides, and JAX's shapes
    are few."""
    whole = x.new_zeros((padded(num_tokens), *x.shape[1:]))
    whole[:num_tokens] = x[:num_tokens]
    lent: jax.Array = jax.dlpack.from_dlpack(whole)
    return lent


def _borrowed(x: jax.Array) -> Tensor:
    """torch's view of JAX's memory, once it is computed. Good until the array is donated; never
    written."""
    tensor: Tensor = torch.utils.dlpack.from_dlpack(x.block_until_ready())
    return tensor
