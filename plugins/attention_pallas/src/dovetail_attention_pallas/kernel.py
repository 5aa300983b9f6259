"""Implement ragged paged attention in JAX: a pure function of the cache with one Pallas kernel for
TPU.

The kernel iterates over a list of (query tile, cache block) pairs for each KV head. The list is
prefetched as scalars, so that the address of the next block is known and the block is loaded while
the current one is computed. The softmax is online (Milakov and Gimelshein, 2018, arXiv:1805.02867):
each query has a running maximum, sum and weighted value in float32 until the last block of its
tile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dovetail_attention_pallas.schedule import Schedule

LANES = 128
"""Lanes of the vector unit. The running maximum and sum are stored in every lane, which avoids a
relayout."""
HIDDEN = -2.0e38
"""The logit of masked keys. It is finite, so that the difference of two is not NaN."""


class Cache(NamedTuple):
    """The cache of one layer: keys and values, each `[num_blocks, Hkv, block_size, D]`, so that the
    part of a block that belongs to one head is contiguous."""

    keys: jax.Array
    values: jax.Array


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: Cache,
    schedule: Schedule,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, Cache]:
    """Write the keys and values of a step, then attend. Returns the output `[T, Hq, D]` in q's
    dtype and the updated cache.

    q is `[T, Hq, D]`; k and v are `[T, Hkv, D]`; sinks is f32[Hq]. T is the number of tokens of the
    step, padded by `schedule.padded`. The results of the padding are undefined. All keys and values
    are written before any is read. `interpret` runs the kernel without a TPU, slowly. The function
    is pure: jit it with the cache donated to update the cache in place.
    """
    cache = write(k, v, cache, schedule)
    return (
        attend(
            q, cache, schedule, scale=scale, soft_cap=soft_cap, sinks=sinks, interpret=interpret
        ),
        cache,
    )


def write(k: jax.Array, v: jax.Array, cache: Cache, schedule: Schedule) -> Cache:
    """Return the cache with the keys and values of the step at their slots: the first half of
    `paged_attention`."""
    block_size = cache.keys.shape[2]
    block, offset = schedule.slot_mapping // block_size, schedule.slot_mapping % block_size
    new = (x.astype(cache.keys.dtype) for x in (k, v))
    return Cache(
        *(old.at[block, :, offset].set(x, mode="drop") for old, x in zip(cache, new, strict=True))
    )


def attend(
    q: jax.Array,
    cache: Cache,
    schedule: Schedule,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attend to the cache, q `[T, Hq, D]` → `[T, Hq, D]`: the second half of `paged_attention`."""
    _, num_heads, head_size = q.shape
    num_tiles, tile = schedule.tile_tokens.shape
    num_kv_heads = cache.keys.shape[1]
    # A tile has a row for each query head of the KV head and each token.
    rows = num_heads // num_kv_heads * tile

    tiles = q[schedule.tile_tokens].reshape(num_tiles, tile, num_kv_heads, -1, head_size)
    tiles = tiles.transpose(0, 2, 3, 1, 4).reshape(num_tiles, num_kv_heads, rows, head_size)
    first = jnp.full(num_heads, HIDDEN, jnp.float32) if sinks is None else sinks.astype(jnp.float32)
    first = jnp.repeat(first.reshape(num_kv_heads, -1), tile, axis=1)[..., None]  # [Hkv, rows, 1]
    out = _attend(tiles, first, cache, schedule, scale, soft_cap, interpret)
    out = out.reshape(num_tiles, num_kv_heads, -1, tile, head_size).transpose(0, 3, 1, 2, 4)
    return out.reshape(num_tiles * tile, num_heads, head_size)[schedule.token_place]


def _attend(
    tiles: jax.Array,
    first: jax.Array,
    cache: Cache,
    schedule: Schedule,
    scale: float,
    soft_cap: float | None,
    interpret: bool,
) -> jax.Array:
    """Map `tiles` `[N, Hkv, rows, D]` to `[N, Hkv, rows, D]`. `first` is f32`[Hkv, rows, 1]`, the
    initial maximum."""
    _, num_kv_heads, rows, head_size = tiles.shape
    block_size = cache.keys.shape[2]
    tile = schedule.tile_tokens.shape[1]
    scalars = schedule[3:]  # positions, work list, window
    of_tile = pl.BlockSpec((1, 1, rows, head_size), lambda h, w, *s: (s[4][w], h, 0, 0))
    of_block = pl.BlockSpec((1, 1, block_size, head_size), lambda h, w, *s: (s[5][w], h, 0, 0))
    of_head = pl.BlockSpec((1, rows, 1), lambda h, w, *s: (h, 0, 0))
    attend: Callable[..., jax.Array] = pl.pallas_call(
        functools.partial(_kernel, tile=tile, scale=scale, soft_cap=soft_cap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(num_kv_heads, len(schedule.work_tile)),
            in_specs=[of_head, of_tile, of_block, of_block],
            out_specs=of_tile,
            scratch_shapes=[pltpu.VMEM((rows, n), jnp.float32) for n in (LANES, LANES, head_size)],
        ),
        out_shape=tiles,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
    )
    return attend(*scalars, first, tiles, *cache)


def _kernel(
    position: Any,
    end: Any,
    page: Any,
    work: Any,
    work_tile: Any,
    work_block: Any,
    window: Any,
    first: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    top: Any,
    total: Any,
    acc: Any,
    *,
    tile: int,
    scale: float,
    soft_cap: float | None,
) -> None:
    """Process one tile and one block of one KV head. `top` and `total`, f32`[rows, LANES]`, and
    `acc`, f32`[rows, D]`, persist over the blocks of the tile."""
    w = pl.program_id(1)
    n = work_tile[w]

    @pl.when(w == work[n])
    def _begin() -> None:
        # A sink is a key with this logit and no value. Without sinks, `first` is HIDDEN, and the
        # first visible key reduces its weight to 0.
        top[...] = jnp.broadcast_to(first[0], top.shape)
        total[...] = jnp.ones_like(total)
        acc[...] = jnp.zeros_like(acc)

    @pl.when(w < work[n + 1])
    def _accumulate() -> None:
        rows, block_size = q.shape[2], k.shape[2]
        begin = (page[n] + w - work[n]) * block_size
        key_at = begin + lax.broadcasted_iota(jnp.int32, (rows, block_size), 1)
        query_at = position[n] + (
            lax.broadcasted_iota(jnp.int32, (rows, block_size), 0) & (tile - 1)
        )
        query_at = jnp.minimum(query_at, end[n] - 1)
        seen = (key_at <= query_at) & (key_at > query_at - window[0])

        logits = _dot(q[0, 0], k[0, 0], 1) * scale
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        logits = jnp.where(seen, logits, HIDDEN)
        before = top[:, :1]
        highest = jnp.maximum(before, logits.max(axis=1, keepdims=True))
        # While a query has no visible key, all keys have equal weight. Its first visible key
        # reduces their weights to 0.
        weights, fade = jnp.exp(logits - highest), jnp.exp(before - highest)
        # Slots that no query of the tile attends to are undefined, and 0 · NaN would be NaN.
        value_at = begin + lax.broadcasted_iota(jnp.int32, (block_size, 1), 0)
        values = jnp.where((value_at < end[n]) & (value_at > position[n] - window[0]), v[0, 0], 0)
        top[...] = jnp.broadcast_to(highest, top.shape)
        total[...] = total[...] * fade + weights.sum(axis=1, keepdims=True)
        acc[...] = acc[...] * fade + _dot(weights.astype(values.dtype), values, 0)

    @pl.when(w == work[n + 1] - 1)
    def _finish() -> None:
        out[0, 0] = (acc[...] / total[:, :1]).astype(out.dtype)


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Multiply `[rows, x]` by b over `axis` of b, accumulating in float32. Operands of different
    dtypes are converted to float32."""
    if a.dtype != b.dtype:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (axis,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
