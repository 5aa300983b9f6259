"""GEMM with quantized weights in Triton: weights dequantized in registers, and 8-bit weights by
8-bit inputs.

`multiply_words` supports every format whose weights are dequantized to the dtype of the inputs. Its
weights are 32-bit words `[chunks, 16, out]` (layout.py). A word has the codes of inputs that are 16
apart, so that the codes at one bit position of 16 words belong to 16 consecutive inputs. Such a
plane, `[16, BLOCK_N]`, is directly an operand of `tl.dot`.

`multiply_codes` multiplies codes by codes. If the inputs are split over programs, both kernels
store float32 partial sums, which `add_up` adds in a fixed order, so the same input produces the
same bits.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator" mypy does not know the types of
# Triton's language.
from __future__ import annotations

import triton
import triton.language as tl

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
def float8(x):
    """Return the code (u8) of the E4M3 number nearest to float32 `x`, ties to even, clamped to
    ±448. It uses integer arithmetic, because Triton's own conversion differs between its
    interpreter and its targets and does not exist before sm_89."""
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = ((size * 512.0 + ROUND) - ROUND).to(tl.uint32)  # below 2^-6, in steps of 2^-9
    return (tl.where(size < 0.015625, small, normal) | tl.where(x < 0, 0x80, 0)).to(tl.uint8)


@triton.jit
def from_float8(codes, TYPE: tl.constexpr):
    """Convert integer E4M3 codes to TYPE, exactly. With its bits placed in a float16, the exponent
    of an E4M3 number is too small by 8; subnormal numbers remain subnormal."""
    half = ((codes & 0x7F) << 7 | (codes & 0x80) << 8).to(tl.uint16).to(tl.float16, bitcast=True)
    return (half * 256.0).to(TYPE)


@triton.jit
def offset(zeros, KIND: tl.constexpr, COMPUTE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return the numbers that `plane` subtracts: the zero points `[BLOCK_N]` (u8 or float32) plus
    the offset of the codes."""
    if KIND != "uint4":
        less = zeros.to(tl.float32) + 8388608.0
    elif INTERPRETED or tl.float32 == COMPUTE:
        less = zeros.to(tl.float32)
    elif tl.bfloat16 == COMPUTE:
        less = (zeros.to(tl.float32) + 128.0).to(COMPUTE)
    else:
        less = (zeros.to(tl.float32) + 1024.0).to(COMPUTE)
    return less


@triton.jit
def plane(
    words,
    P: tl.constexpr,
    less,
    KIND: tl.constexpr,
    COMPUTE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Return the weights of plane P of words (i32[16, BLOCK_N]), minus their zero points and not
    yet scaled: small integers or E4M3 numbers, which COMPUTE represents exactly.

    An integer is converted by placing it in the mantissa of a number whose last place has the value
    1, and subtracting that number, because integer conversion instructions run at a fraction of the
    rate of arithmetic. Two nibbles, 16 bits apart, are converted at once.
    """
    TYPE: tl.constexpr = tl.float32 if INTERPRETED else COMPUTE
    if KIND == "float8":
        weights = from_float8((words >> (8 * P)) & 0xFF, TYPE)
    elif KIND == "int8":
        raised = ((words >> (8 * P)) & 0xFF) | 0x4B000000
        weights = (raised.to(tl.float32, bitcast=True) - less[None, :]).to(TYPE)
    elif tl.float32 == TYPE:
        weights = ((words >> (4 * (P // 2) + 16 * (P % 2))) & 15).to(tl.float32) - less[None, :]
    else:
        # (words & 0x000F000F) | two numbers whose last place has the value 1. The compiler does not
        # generate this single instruction by itself.
        RAISE: tl.constexpr = "0x43004300" if tl.bfloat16 == COMPUTE else "0x64006400"
        shifted = words >> (4 * (P // 2))
        pair = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x000F000F, " + RAISE + ", 0xEA;",
            "=r,r",
            [shifted],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        weights = (pair >> (16 * (P % 2))).to(tl.uint16).to(COMPUTE, bitcast=True) - less[None, :]
    return weights


@triton.jit
def multiply_words(
    x,
    words,
    scales,
    zeros,
    x_scales,
    bias,
    out,
    num_rows,
    num_outs,
    x_row,
    out_row,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    KIND: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    IN_GROUPS: tl.constexpr,
    HAS_X_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Compute `out[m, n] = sum over k of x[m, k] · weight[n, k]` with programs (tile of n, tile of
    m, share of k).

    A group of GROUP inputs takes PADDED places, a multiple of 16. x is zero at places beyond the
    group or beyond IN. With SPLIT_K > 1, `out` is f32[SPLIT_K, rows, outs], and the kernel stores
    sums without the bias and the scales of rows.
    """
    ROWS: tl.constexpr = 16  # of a plane, as in layout.py
    PLANES: tl.constexpr = 8 if KIND == "uint4" else 4
    CHUNK: tl.constexpr = ROWS * PLANES
    IS_FULL: tl.constexpr = GROUP == PADDED and NUM_CHUNKS * CHUNK == IN
    INPUT: tl.constexpr = tl.float32 if INTERPRETED else COMPUTE
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    share = tl.program_id(2)
    j = tl.arange(0, ROWS)
    is_n, is_m = n < num_outs, m < num_rows
    per: tl.constexpr = (NUM_CHUNKS + SPLIT_K - 1) // SPLIT_K
    begin = share * per
    end = tl.minimum(begin + per, NUM_CHUNKS)
    x_at = x + m.to(tl.int64)[:, None] * x_row
    usual: tl.constexpr = 8.0 if KIND == "uint4" else 128.0
    less = offset(tl.full([BLOCK_N], usual, tl.float32), KIND, COMPUTE, INTERPRETED)
    if HAS_ZEROS and not IN_GROUPS:
        less = offset(tl.load(zeros + n, mask=is_n, other=0), KIND, COMPUTE, INTERPRETED)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for chunk in range(begin, end):
        at = words + (chunk * ROWS + j).to(tl.int64)[:, None] * num_outs + n[None, :]
        word = tl.load(at, mask=is_n[None, :], other=0)
        part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        # The group of place 0 of the chunk, its offset in the group, and its input. Everything else
        # is known at compile time.
        group, into = chunk * CHUNK // PADDED, chunk * CHUNK % PADDED
        k = (
            chunk * CHUNK + j if IS_FULL else group * GROUP + into + j
        )  # the compiler can prove the alignment of the first form only
        inputs_at, group_at = x_at + k[None, :], group * num_outs + n
        for p in tl.static_range(PLANES):
            groups_on = p * ROWS // PADDED  # 0 if a chunk is within one group
            further = p * ROWS // PADDED * GROUP + p * ROWS % PADDED
            if IN_GROUPS and p * ROWS % PADDED == 0:
                scale = tl.load(scales + group_at + groups_on * num_outs, mask=is_n, other=0.0)
                if HAS_ZEROS:
                    zero = tl.load(zeros + group_at + groups_on * num_outs, mask=is_n, other=0)
                    less = offset(zero, KIND, COMPUTE, INTERPRETED)
            seen = is_m[:, None]
            if not IS_FULL:
                seen = seen & (k < IN - further)[None, :]
            if GROUP < PADDED:
                seen = seen & (into + j < GROUP - p * ROWS % PADDED)[None, :]
            inputs = tl.load(inputs_at + further, mask=seen, other=0.0)
            weights = plane(word, p, less, KIND, COMPUTE, INTERPRETED)
            if IN_GROUPS:
                part = tl.dot(inputs.to(INPUT), weights, part, input_precision="ieee")
                if p == PLANES - 1 or (p + 1) * ROWS % PADDED == 0:
                    total += part * scale[None, :]
                    part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            else:
                total = tl.dot(inputs.to(INPUT), weights, total, input_precision="ieee")
    if not IN_GROUPS:
        total = total * tl.load(scales + n, mask=is_n, other=0.0)[None, :]
    store(
        total,
        x_scales,
        bias,
        out,
        m,
        n,
        share,
        num_rows,
        num_outs,
        out_row,
        HAS_X_SCALES,
        HAS_BIAS,
        SPLIT_K,
        INTERPRETED,
    )


@triton.jit
def multiply_codes(
    x,
    codes,
    scales,
    x_scales,
    bias,
    out,
    num_rows,
    num_outs,
    x_row,
    out_row,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    NUM_PLACES: tl.constexpr,
    IN_GROUPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Compute the same product of codes `x [rows, IN]` and `codes [outs, NUM_PLACES]`, both int8 or
    both float8. BLOCK_K divides PADDED."""
    IS_FULL: tl.constexpr = GROUP == PADDED and NUM_PLACES == IN
    IS_INT: tl.constexpr = codes.dtype.element_ty == tl.int8
    SUM: tl.constexpr = tl.int32 if IS_INT else tl.float32
    INPUT: tl.constexpr = tl.float32 if INTERPRETED and not IS_INT else codes.dtype.element_ty
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.program_id(2)
    r = tl.arange(0, BLOCK_K)
    is_n, is_m = n < num_outs, m < num_rows
    NUM_STEPS: tl.constexpr = NUM_PLACES // BLOCK_K
    per: tl.constexpr = (NUM_STEPS + SPLIT_K - 1) // SPLIT_K
    begin = share * per
    end = tl.minimum(begin + per, NUM_STEPS)
    x_at = x + m.to(tl.int64)[:, None] * x_row
    codes_at = codes + n.to(tl.int64)[None, :] * NUM_PLACES
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    part = tl.zeros([BLOCK_M, BLOCK_N], SUM)
    for step in range(begin, end):
        place = step * BLOCK_K
        if IS_FULL:
            inputs = tl.load(x_at + (place + r)[None, :], mask=is_m[:, None], other=0.0)
        else:
            within = place % PADDED + r
            k = place // PADDED * GROUP + within
            seen = is_m[:, None] & ((within < GROUP) & (k < IN))[None, :]
            inputs = tl.load(x_at + k[None, :], mask=seen, other=0.0)
        weights = tl.load(codes_at + (place + r)[:, None], mask=is_n[None, :], other=0.0)
        if IN_GROUPS:
            scale = tl.load(scales + place // PADDED * num_outs + n, mask=is_n, other=0.0)
            part = tl.dot(inputs.to(INPUT), weights.to(INPUT), out_dtype=SUM)
            total += part.to(tl.float32) * scale[None, :]
        else:
            part = tl.dot(inputs.to(INPUT), weights.to(INPUT), part, out_dtype=SUM)
    if not IN_GROUPS:
        total = part.to(tl.float32) * tl.load(scales + n, mask=is_n, other=0.0)[None, :]
    store(
        total,
        x_scales,
        bias,
        out,
        m,
        n,
        share,
        num_rows,
        num_outs,
        out_row,
        True,
        HAS_BIAS,
        SPLIT_K,
        INTERPRETED,
    )


@triton.jit
def store(
    total,
    x_scales,
    bias,
    out,
    m,
    n,
    share,
    num_rows,
    num_outs,
    out_row,
    HAS_X_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Store a tile, as final outputs or as partial sums."""
    is_n, is_m = n < num_outs, m < num_rows
    inside = is_m[:, None] & is_n[None, :]
    if SPLIT_K > 1:
        row = share.to(tl.int64) * num_rows + m
        tl.store(out + row[:, None] * num_outs + n[None, :], total, mask=inside)
    else:
        if HAS_X_SCALES:
            total = total * tl.load(x_scales + m, mask=is_m, other=0.0)[:, None]
        if HAS_BIAS:
            total += tl.load(bias + n, mask=is_n, other=0.0).to(tl.float32)[None, :]
        at = m.to(tl.int64)[:, None] * out_row + n[None, :]
        tl.store(out + at, narrowed(total, out.dtype.element_ty, INTERPRETED), mask=inside)


@triton.jit
def add_up(
    parts,
    x_scales,
    bias,
    out,
    num_rows,
    num_outs,
    HAS_X_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Add partial sums f32[SPLIT_K, rows, outs] in order, with programs (range of outputs, row)."""
    m = tl.program_id(1)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_n = n < num_outs
    total = tl.zeros([BLOCK], tl.float32)
    for share in tl.static_range(SPLIT_K):
        total += tl.load(
            parts + (share * num_rows + m).to(tl.int64) * num_outs + n, mask=is_n, other=0.0
        )
    if HAS_X_SCALES:
        total = total * tl.load(x_scales + m)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=is_n, other=0.0).to(tl.float32)
    tl.store(
        out + m.to(tl.int64) * num_outs + n,
        narrowed(total, out.dtype.element_ty, INTERPRETED),
        mask=is_n,
    )


@triton.jit
def rounded(x, scale, KIND: tl.constexpr):
    """Return the codes of float32 `x`. float8 has a code for NaN. int8 has none, so there the scale
    of the row is NaN. Divisions round to nearest (`div.rn`), as in PyTorch, because `/` is only
    accurate to 2 ulp, which may result in an adjacent code."""
    number = tl.where(x == x, tl.div_rn(x, scale), 0.0)
    if KIND == "int8":
        codes = ((tl.minimum(tl.maximum(number, -127.0), 127.0) + ROUND) - ROUND).to(tl.int8)
    else:
        codes = tl.where(x == x, float8(number), 0x7F).to(tl.uint8)
    return codes


@triton.jit
def size_of(x, HAS_FIXED: tl.constexpr):
    """Return the magnitudes from which the scale of a row is computed. Infinity marks rows without
    a valid scale."""
    return tl.where(x == x, tl.minimum(tl.abs(x), 3e38) if HAS_FIXED else tl.abs(x), float("inf"))


@triton.jit
def round_rows(
    x,
    fixed,
    codes,
    scales,
    num_rows,
    x_row,
    IN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    HAS_FIXED: tl.constexpr,
    AS_FLOAT: tl.constexpr,
):
    """Quantize BLOCK_M rows per program: store their codes (int8, or float8 as u8), contiguous, and
    their scales. A scale is `fixed`, or computed from the largest magnitude of the row, or NaN.
    With AS_FLOAT, `codes` has a floating-point dtype, and the values of the codes are stored."""
    LARGEST: tl.constexpr = 127.0 if KIND == "int8" else 448.0
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    is_m = m < num_rows
    k = tl.arange(0, BLOCK)
    at = m[:, None] * x_row + k[None, :]
    values = tl.load(x + at, mask=is_m[:, None] & (k < IN)[None, :], other=0.0).to(tl.float32)
    sizes = size_of(values, HAS_FIXED)
    for start in range(BLOCK, IN, BLOCK):
        more = tl.load(
            x + at + start, mask=is_m[:, None] & (start + k < IN)[None, :], other=0.0
        ).to(tl.float32)
        sizes = tl.maximum(sizes, size_of(more, HAS_FIXED))
    top = tl.max(sizes, 1)
    is_number = top < float("inf")
    scale = tl.load(fixed) if HAS_FIXED else tl.div_rn(top, LARGEST)
    scale = tl.where(is_number, scale, 1.0)
    scale = tl.where(scale > 0, scale, 1.0)
    tl.store(scales + m, tl.where(is_number, scale, float("nan")), mask=is_m)
    for start in range(0, IN, BLOCK):
        inside = is_m[:, None] & (start + k < IN)[None, :]
        if IN > BLOCK:
            values = tl.load(x + at + start, mask=inside, other=0.0).to(tl.float32)
        code = rounded(values, scale[:, None], KIND)
        to = codes + m[:, None] * IN + start + k[None, :]
        if AS_FLOAT:
            number = (
                from_float8(code.to(tl.int32), tl.float32)
                if KIND == "float8"
                else code.to(tl.float32)
            )
            tl.store(to, number.to(codes.dtype.element_ty), mask=inside)
        else:
            tl.store(to, code, mask=inside)


@triton.jit
def expand_words(
    words,
    scales,
    zeros,
    out,
    num_outs,
    first,
    width,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    KIND: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COMPUTE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Dequantize the weights of outputs `first … first + width - 1` to `out [IN, width]`, with
    programs (tile of outputs, chunk)."""
    ROWS: tl.constexpr = 16  # of a plane, as in layout.py
    PLANES: tl.constexpr = 8 if KIND == "uint4" else 4
    chunk = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, ROWS)
    is_n, n = column < width, first + column
    word = tl.load(
        words + (chunk * ROWS + j).to(tl.int64)[:, None] * num_outs + n[None, :],
        mask=is_n[None, :],
        other=0,
    )
    usual: tl.constexpr = 8.0 if KIND == "uint4" else 128.0
    less = offset(tl.full([BLOCK_N], usual, tl.float32), KIND, COMPUTE, INTERPRETED)
    for p in tl.static_range(PLANES):
        place = chunk * (ROWS * PLANES) + p * ROWS
        if p == 0 or p * ROWS % PADDED == 0:
            group_at = place // PADDED * num_outs + n
            scale = tl.load(scales + group_at, mask=is_n, other=0.0)
            if HAS_ZEROS:
                less = offset(
                    tl.load(zeros + group_at, mask=is_n, other=0), KIND, COMPUTE, INTERPRETED
                )
        weights = plane(word, p, less, KIND, COMPUTE, INTERPRETED).to(tl.float32) * scale[None, :]
        within = place % PADDED + j
        k = place // PADDED * GROUP + within
        inside = ((within < GROUP) & (k < IN))[:, None] & is_n[None, :]
        at = out + k.to(tl.int64)[:, None] * width + column[None, :]
        tl.store(at, narrowed(weights, out.dtype.element_ty, INTERPRETED), mask=inside)
