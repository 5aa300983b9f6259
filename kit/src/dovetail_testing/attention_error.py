"""Define how far the output of a correct attention kernel may be from the exact result."""

from __future__ import annotations

ROUNDING = {
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "float8_e4m3fn": 2.0**-8,
    "int8": 2.0**-8,
}
"""Half of the distance from 1 to the next number. For one-byte types that of bfloat16, which
represents all their numbers and in which a kernel may multiply them."""
SMALLEST = {"float32": 2.0**-126, "float16": 2.0**-24, "bfloat16": 2.0**-126}
"""Allowed absolute error near zero: the smallest step of float16; other types may flush subnormal
numbers to zero."""


def relative_error(dtype: str, kv_dtype: str, largest_logit: float) -> float:
    """Return the allowed error of a correct kernel, relative to Σ weight·|v| + |out|.

    Sums and softmax are float32: an error in a logit is the same relative error in its weight, and
    a logit of size x has an error of about 2^-24 · x per partial sum. In addition the output is
    rounded to its dtype, and a kernel may round the weights, and the queries if KV has another
    dtype, to the coarser of the two dtypes before it multiplies.
    """
    float32 = ROUNDING["float32"] * (64 + 16 * largest_logit)
    coarsest = max(ROUNDING[dtype], ROUNDING[kv_dtype])
    if coarsest == ROUNDING["float32"]:
        return float32
    return float32 + coarsest * (1.0 if dtype == kv_dtype else 1.0 + 0.5 * largest_logit)
