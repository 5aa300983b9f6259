"""PagedAttention in Triton: write the keys and values of a step, attend, and merge split contexts.

One kernel computes prefill, chunked prefill and decode. A tile is `TOKENS` query tokens of one row
times the `GROUP` query heads that share a key/value head, so that keys and values are read once for
all of them. It iterates over its keys in blocks of `BLOCK_N` with the running maximum and sum of
FlashAttention-2 (arXiv:2307.08691). If the context of a row is split over several programs (as in
Flash-Decoding), each program stores an unnormalized sum, its maximum and its weight, and `merge`
combines them.

The grid is fixed: programs process the pieces of a work list (schedule.py) with a stride of the
grid size, so that one captured launch computes any step that the list describes.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator" mypy does not know the types of
# Triton's language.
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
ROUND = tl.constexpr(12582912.0)
"""1.5 · 2^23: adding it to a small float32 and subtracting it rounds to the nearest integer, ties
to even."""


@triton.jit
def narrowed(x, TYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Convert float32 `x` to TYPE, rounding to nearest. Triton's interpreter would truncate to
    bfloat16."""
    if INTERPRETED and tl.bfloat16 == TYPE:
        bits = x.to(tl.uint32, bitcast=True)
        x = tl.where(
            x == x,
            ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True),
            x,
        )
    return x.to(TYPE)


@triton.jit
def stored(x, scale, KIND: tl.constexpr, TYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Convert float32 `x` to the value stored in a cache of KIND and TYPE
    (`AttentionLayer.kv_scales`).

    The division rounds to nearest (`div.rn`), because the contract compares caches bit by bit and
    `/` is only accurate to 2 ulp. There is one return statement, because Triton requires all
    returns of a function to have one type.
    """
    if KIND == "int8":
        x = tl.div_rn(x, scale)
        x = tl.where(x == x, tl.minimum(tl.maximum(x, -127.0), 127.0), 0.0)
        codes = ((x + ROUND) - ROUND).to(tl.int8)
    elif KIND == "float8":
        codes = float8(tl.div_rn(x, scale)).to(tl.float8e4nv, bitcast=True)
    else:
        codes = narrowed(x, TYPE, INTERPRETED)
    return codes


@triton.jit
def float8(x):
    """Return the code (u8) of the E4M3 number nearest to float32 `x`, ties to even, clamped to
    ±448. It uses integer arithmetic, because Triton's own conversion differs between its
    interpreter and its targets."""
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = ((size * 512.0 + ROUND) - ROUND).to(tl.uint32)  # below 2^-6, in steps of 2^-9
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(x == x, code, 0x7F)
    return (code | tl.where(x < 0, 0x80, 0)).to(tl.uint8)


@triton.jit
def write_kv(
    k,
    v,
    k_cache,
    v_cache,
    slots,
    kv_scales,
    k_token,
    k_head,
    v_token,
    v_head,
    cache_block,
    cache_head,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Write the keys and values of all heads of one token per program to its slot. `WIDTH` is HEADS
    · D rounded up to a power of two."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    at = tl.arange(0, WIDTH)
    inside, head, d = at < HEADS * D, at // D, at % D
    to = slot // BLOCK_SIZE * cache_block + head * cache_head + slot % BLOCK_SIZE * D + d
    k_scale = tl.load(kv_scales) if HAS_SCALES else 1.0
    v_scale = tl.load(kv_scales + 1) if HAS_SCALES else 1.0
    keys = tl.load(k + token * k_token + head * k_head + d, mask=inside)
    values = tl.load(v + token * v_token + head * v_head + d, mask=inside)
    keys, values = keys.to(tl.float32), values.to(tl.float32)
    keys = stored(keys, k_scale, KIND, k_cache.dtype.element_ty, INTERPRETED)
    values = stored(values, v_scale, KIND, v_cache.dtype.element_ty, INTERPRETED)
    tl.store(k_cache + to, keys, mask=inside)
    tl.store(v_cache + to, values, mask=inside)


@triton.jit
def attend(
    q,
    out,
    k_cache,
    v_cache,
    table,
    query_start,
    seq_lens,
    sinks,
    kv_scales,
    work,
    num_work,
    partial_sum,
    partial_top,
    partial_weight,
    scale,
    soft_cap,
    window,
    q_token,
    q_head,
    out_token,
    out_head,
    cache_block,
    cache_head,
    table_row,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    COMPUTE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Compute the pieces of `work` i32[num_work, 5], each for all KV heads: (row, first token of
    the tile within the row, first key, end of keys, index of the partial result or -1).

    COMPUTE is the dtype of the products' inputs. INTERPRETED widens them to float32, because
    Triton's interpreter multiplies bfloat16 incorrectly.
    """
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    INPUT: tl.constexpr = tl.float32 if INTERPRETED else COMPUTE
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    in_head = d < D
    total = tl.load(num_work) * KV_HEADS
    k_scale = tl.load(kv_scales) if HAS_SCALES else 1.0
    v_scale = tl.load(kv_scales + 1) if HAS_SCALES else 1.0
    logit_scale = scale * k_scale
    if not HAS_CAP:
        logit_scale *= LOG2E
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        entry, head = work + item // KV_HEADS * 5, item % KV_HEADS
        row, first = tl.load(entry), tl.load(entry + 1)
        begin, end, place = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
        row_start = tl.load(query_start + row)
        row_tokens = tl.load(query_start + row + 1) - row_start
        length = tl.load(seq_lens + row)
        within = first + m // GROUP
        is_row = (m < TOKENS * GROUP) & (within < row_tokens)
        position = length - row_tokens + within
        token, q_at = (row_start + within).to(tl.int64), head * GROUP + m % GROUP
        queries = tl.load(
            q + token[:, None] * q_token + q_at[:, None] * q_head + d[None, :],
            mask=is_row[:, None] & in_head[None, :],
            other=0.0,
        ).to(INPUT)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        weight = tl.zeros([BLOCK_M], tl.float32)
        total_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(begin, end, BLOCK_N):
            key_at = start + tl.arange(0, BLOCK_N)
            is_key = key_at < end
            block = tl.load(
                table + row.to(tl.int64) * table_row + key_at // BLOCK_SIZE, mask=is_key, other=0
            )
            base = block.to(tl.int64) * cache_block + head * cache_head + (key_at % BLOCK_SIZE) * D
            keys = tl.load(
                k_cache + base[None, :] + d[:, None],
                mask=is_key[None, :] & in_head[:, None],
                other=0.0,
            ).to(INPUT)
            logits = tl.dot(queries, keys, input_precision="ieee") * logit_scale
            if HAS_CAP:
                # tanh is computed with exp2, which Triton supports on every target.
                turned = tl.exp2(logits * (2.0 * LOG2E / soft_cap))
                logits = soft_cap * LOG2E * (1.0 - 2.0 / (turned + 1.0))
            seen = is_key[None, :] & (key_at[None, :] <= position[:, None])
            if HAS_WINDOW:
                seen = seen & (key_at[None, :] > position[:, None] - window)
            logits = tl.where(seen, logits, float("-inf"))
            new_top = tl.maximum(top, tl.max(logits, 1))
            base_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # no visible key yet
            weights = tl.exp2(logits - base_top[:, None])
            shrink = tl.exp2(top - base_top)
            weight = weight * shrink + tl.sum(weights, 1)
            top = new_top
            values = tl.load(
                v_cache + base[:, None] + d[None, :],
                mask=is_key[:, None] & in_head[None, :],
                other=0.0,
            ).to(INPUT)
            weights = narrowed(weights, COMPUTE, INTERPRETED).to(INPUT)
            total_sum = total_sum * shrink[:, None] + tl.dot(
                weights, values, input_precision="ieee"
            )
        if place < 0:
            if HAS_SINKS:
                sink = tl.load(sinks + q_at) * LOG2E
                new_top = tl.maximum(top, sink)
                shrink = tl.exp2(top - new_top)
                weight = weight * shrink + tl.exp2(sink - new_top)
                total_sum = total_sum * shrink[:, None]
            result = total_sum / tl.where(is_row, weight, 1.0)[:, None] * v_scale
            tl.store(
                out + token[:, None] * out_token + q_at[:, None] * out_head + d[None, :],
                narrowed(result, out.dtype.element_ty, INTERPRETED),
                mask=is_row[:, None] & in_head[None, :],
            )
        else:
            at = (place * KV_HEADS + head).to(tl.int64) * BLOCK_M + m
            tl.store(partial_sum + at[:, None] * BLOCK_D + d[None, :], total_sum)
            tl.store(partial_top + at, top)
            tl.store(partial_weight + at, weight)


@triton.jit
def merge(
    out,
    query_start,
    sinks,
    kv_scales,
    tiles,
    partial_sum,
    partial_top,
    partial_weight,
    out_token,
    out_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Merge the partial results of `tiles` i32[grid, 4]: (row, first token of the tile within the
    row, first partial result, number of partial results). If the number is 0, the tile was not
    split and `attend` has stored its output."""
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    entry, head = tiles + tl.program_id(0) * 4, tl.program_id(1)
    place, count = tl.load(entry + 2), tl.load(entry + 3)
    if count > 0:
        row, first = tl.load(entry), tl.load(entry + 1)
        m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        row_start = tl.load(query_start + row)
        within = first + m // GROUP
        is_row = (m < TOKENS * GROUP) & (row_start + within < tl.load(query_start + row + 1))
        q_at = head * GROUP + m % GROUP
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        weight = tl.zeros([BLOCK_M], tl.float32)
        if HAS_SINKS:
            top = tl.load(sinks + q_at) * LOG2E
            weight += 1.0
        total_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for i in range(count):
            at = ((place + i) * KV_HEADS + head).to(tl.int64) * BLOCK_M + m
            part_top = tl.load(partial_top + at)
            new_top = tl.maximum(top, part_top)
            base_top = tl.where(new_top == float("-inf"), 0.0, new_top)
            shrink, grow = tl.exp2(top - base_top), tl.exp2(part_top - base_top)
            weight = weight * shrink + tl.load(partial_weight + at) * grow
            part = tl.load(partial_sum + at[:, None] * BLOCK_D + d[None, :])
            total_sum = total_sum * shrink[:, None] + part * grow[:, None]
            top = new_top
        v_scale = tl.load(kv_scales + 1) if HAS_SCALES else 1.0
        result = total_sum / tl.where(is_row, weight, 1.0)[:, None] * v_scale
        token = (row_start + within).to(tl.int64)
        tl.store(
            out + token[:, None] * out_token + q_at[:, None] * out_head + d[None, :],
            narrowed(result, out.dtype.element_ty, INTERPRETED),
            mask=is_row[:, None] & (d < D)[None, :],
        )
