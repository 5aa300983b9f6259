# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton's language has no types that mypy knows.
"""What stands between a decoder's matrix products, in Triton: one pass over memory each.
`operations.py` is the same in torch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

LARGEST = tl.constexpr(80.0)
"""Of what is given to exp: more would overflow."""
HEADS_AT_A_TIME, FEATURES_AT_A_TIME = 8, 1024


@triton.jit
def rounded(x, TYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 `x` to the nearest of TYPE; Triton's interpreter would cut bfloat16 off."""
    if INTERPRETED and tl.bfloat16 == TYPE:
        bits = x.to(tl.uint32, bitcast=True)
        x = tl.where(
            x == x,
            ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True),
            x,
        )
    return x.to(TYPE)


@triton.jit
def rms_norm_kernel(
    hidden,
    delta,
    weight,
    out,
    eps,
    row_stride,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One program a row."""
    TYPE: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < SIZE
    x = tl.load(hidden + row * row_stride + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        summed = rounded(
            x + tl.load(delta + row * SIZE + at, mask=inside, other=0.0).to(tl.float32),
            TYPE,
            INTERPRETED,
        )
        tl.store(hidden + row * row_stride + at, summed, mask=inside)
        x = summed.to(tl.float32)
    x = rounded(x * tl.rsqrt(tl.sum(x * x) / SIZE + eps), TYPE, INTERPRETED).to(tl.float32)
    x = x * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + at, rounded(x, TYPE, INTERPRETED), mask=inside)


@triton.jit
def rotate_kernel(
    qkv,
    norm,
    cos,
    sin,
    q,
    k,
    v,
    eps,
    row_stride,
    NUM_Q: tl.constexpr,
    NUM_KV: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One program HEADS heads of a token, each as two halves of HALF elements."""
    TYPE: tl.constexpr = q.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    head, at = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, WIDTH)
    inside = (head < NUM_Q + 2 * NUM_KV)[:, None] & (at < HALF)[None, :]
    place = qkv + token * row_stride + head[:, None] * (2 * HALF) + at[None, :]
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
    turns = (head < NUM_Q + NUM_KV)[:, None]
    one, two = first, second
    if HAS_NORM:
        scale = tl.rsqrt((tl.sum(one * one, 1) + tl.sum(two * two, 1)) / (2 * HALF) + eps)[:, None]
        weight, is_normed = norm + head[:, None] * (2 * HALF) + at[None, :], inside & turns
        one = rounded(one * scale, TYPE, INTERPRETED).to(tl.float32) * tl.load(
            weight, mask=is_normed, other=0.0
        ).to(tl.float32)
        two = rounded(two * scale, TYPE, INTERPRETED).to(tl.float32)
        two = two * tl.load(weight + HALF, mask=is_normed, other=0.0).to(tl.float32)
        one = rounded(one, TYPE, INTERPRETED).to(tl.float32)
        two = rounded(two, TYPE, INTERPRETED).to(tl.float32)
    angle = token * (2 * HALF) + HALF + at  # the second half: there the sine has its own sign
    cosine = tl.load(cos + angle, mask=at < HALF, other=0.0).to(tl.float32)[None, :]
    sine = tl.load(sin + angle, mask=at < HALF, other=0.0).to(tl.float32)[None, :]
    turned = one * cosine - two * sine
    two = two * cosine + one * sine
    one = rounded(tl.where(turns, turned, first), TYPE, INTERPRETED)
    two = rounded(tl.where(turns, two, second), TYPE, INTERPRETED)
    to = at[None, :] + head[:, None] * (2 * HALF)
    is_q, is_k = inside & (head < NUM_Q)[:, None], inside & turns & (head >= NUM_Q)[:, None]
    is_v = inside & (head >= NUM_Q + NUM_KV)[:, None]
    q_at = q + token * (NUM_Q * 2 * HALF) + to
    k_at = k + token * (NUM_KV * 2 * HALF) + to - NUM_Q * 2 * HALF
    v_at = v + token * (NUM_KV * 2 * HALF) + to - (NUM_Q + NUM_KV) * 2 * HALF
    tl.store(q_at, one, mask=is_q)
    tl.store(q_at + HALF, two, mask=is_q)
    tl.store(k_at, one, mask=is_k)
    tl.store(k_at + HALF, two, mask=is_k)
    tl.store(v_at, one, mask=is_v)
    tl.store(v_at + HALF, two, mask=is_v)


@triton.jit
def gated_kernel(
    gate_up,
    out,
    row_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One program BLOCK features of a row: activation(gate) · up."""
    TYPE: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    x = tl.load(gate_up + row * row_stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + SIZE + at, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(tl.minimum(-x, LARGEST)))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        twice = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        x = x / (1.0 + tl.exp(tl.minimum(-twice, LARGEST)))
    else:
        x = tl.maximum(x, 0.0)
    x = rounded(x, TYPE, INTERPRETED).to(tl.float32) * up
    tl.store(out + row * SIZE + at, rounded(x, TYPE, INTERPRETED), mask=inside)


IS_INTERPRETED = isinstance(rms_norm_kernel, InterpretedFunction)
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""By the name in a config.json."""


class TritonOperations:
    """`Operations` (operations.py) on a GPU."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(x, None, weight, eps)

    def add_rms_norm(self, hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(hidden, delta.contiguous(), weight, eps)

    def _norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        rows, size = hidden.shape
        out = hidden.new_empty(rows, size)
        if rows:
            rms_norm_kernel[(rows,)](
                hidden,
                delta,
                weight,
                out,
                eps,
                hidden.stride(0),
                SIZE=size,
                WIDTH=triton.next_power_of_2(size),
                HAS_DELTA=delta is not None,
                INTERPRETED=IS_INTERPRETED,
                num_warps=4 if size <= 4096 else 8,
            )
        return out

    def rotated(
        self,
        qkv: Tensor,
        num_heads: int,
        num_kv_heads: int,
        norm: Tensor | None,
        eps: float,
        cos: Tensor,
        sin: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, heads, size = qkv.shape
        q = qkv.new_empty(tokens, num_heads, size)
        k, v = qkv.new_empty(tokens, num_kv_heads, size), qkv.new_empty(tokens, num_kv_heads, size)
        if tokens:
            rotate_kernel[(tokens, triton.cdiv(heads, HEADS_AT_A_TIME))](
                qkv,
                norm,
                cos,
                sin,
                q,
                k,
                v,
                eps,
                qkv.stride(0),
                NUM_Q=num_heads,
                NUM_KV=num_kv_heads,
                HALF=size // 2,
                WIDTH=triton.next_power_of_2(size // 2),
                HEADS=HEADS_AT_A_TIME,
                HAS_NORM=norm is not None,
                INTERPRETED=IS_INTERPRETED,
                num_warps=2,
            )
        return q, k, v

    def gated(self, gate_up: Tensor, activation: str) -> Tensor:
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, size)
        if rows:
            gated_kernel[(rows, triton.cdiv(size, FEATURES_AT_A_TIME))](
                gate_up,
                out,
                gate_up.stride(0),
                SIZE=size,
                BLOCK=FEATURES_AT_A_TIME,
                ACTIVATION=ACTIVATIONS[activation],
                INTERPRETED=IS_INTERPRETED,
                num_warps=4,
            )
        return out
