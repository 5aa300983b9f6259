"""Ragged paged attention in JAX: a pure function of the cache, around one Pallas kernel for TPU.

The kernel walks a list of (query tile, cache block) pairs for each KV head. The list is prefetched
as scalars, so that while one block is computed the next one's address is known and it is on its
way. Softmax is online (Milakov and Gimelshein, 2018, arXiv:1805.02867): a running maximum, sum and
weighted value for each query, in float32, until the tile's last block.
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
"""Of the vector unit: running maximum and sum are kept once a lane, which needs no relayout."""
HIDDEN = -2.0e38
"""The logit of what is not seen: finite, so that a difference of two is a number."""


class Cache(NamedTuple):
    """One layer's, each `[num_blocks, Hkv, block_size, D]`: a head's part of a block lies
    together."""

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
    """Write a step's keys and values, then attend. Returns `[T, Hq, D]` in q's dtype, and the cache
    with what was written.

    q `[T, Hq, D]`; k, v `[T, Hkv, D]`; T is the step's number of tokens as `schedule.padded` has
    it, and what is computed for the padding means nothing. sinks: f32[Hq]. Everything is written
    before anything is read. `interpret` runs the kernel where there is no TPU, slowly. Pure: jit it
    with the cache donated, and the cache is updated in place.
    """
    cache = write(k, v, cache, schedule)
    return (
        attend(
            q, cache, schedule, scale=scale, soft_cap=soft_cap, sinks=sinks, interpret=interpret
        ),
        cache,
    )


def write(k: jax.Array, v: jax.Array, cache: Cache, schedule: Schedule) -> Cache:
    """The first half of `paged_attention`: the cache with the step's keys and values at their
    slots."""
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
    """The second half of `paged_attention`: q `[T, Hq, D]` → `[T, Hq, D]`, over what is in the
    cache."""
    _, num_heads, head_size = q.shape
    num_tiles, tile = schedule.tile_tokens.shape
    num_kv_heads = cache.keys.shape[1]
    rows = (
        num_heads // num_kv_heads * tile
    )  # of a tile: for each query head of the KV head, its tokens

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
    """tiles `[N, Hkv, rows, D]`, first f32`[Hkv, rows, 1]` (the maximum to begin with) → `[N, Hkv,
    rows, D]`."""
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
    """One tile and one block, of one KV head. `top`, `total` f32`[rows, LANES]` and `acc`
    f32`[rows, D]` last over the tile."""
    w = pl.program_id(1)
    n = work_tile[w]

    @pl.when(w == work[n])
    def _begin() -> None:
        # A sink is a key of that logit and no value. Without one `first` is HIDDEN, and the first
        # key seen makes it weigh 0.
        top[...] = jnp.broadcast_to(first[0], top.shape)
        total[...] = jnp.ones_like(total)
        acc[...] = jnp.zeros_like(acc)

    @pl.when(w < work[n + 1])
    def _meet() -> None:
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
        # Of a block in which a query sees nothing yet, it weighs all keys alike; the first that it
        # sees fades them to 0.
        weights, fade = jnp.exp(logits - highest), jnp.exp(before - highest)
        # Slots that no query of the tile sees may hold anything: 0 · NaN would be NaN.
        value_at = begin + lax.broadcasted_iota(jnp.int32, (block_size, 1), 0)
        values = jnp.where((value_at < end[n]) & (value_at > position[n] - window[0]), v[0, 0], 0)
        top[...] = jnp.broadcast_to(highest, top.shape)
        total[...] = total[...] * fade + weights.sum(axis=1, keepdims=True)
        acc[...] = acc[...] * fade + _dot(weights.astype(values.dtype), values, 0)

    @pl.when(w == work[n + 1] - 1)
    def _finish() -> None:
        out[0, 0] = (acc[...] / total[:, :1]).astype(out.dtype)


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """`[rows, x] · b` over `axis` of b, summed in float32. Unequal types meet in float32."""
    if a.dtype != b.dtype:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (axis,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
