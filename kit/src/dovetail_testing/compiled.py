"""Run the operations of a compiled step from Python, one piece at a time, in an order that a team
of threads might have."""

from __future__ import annotations

import ctypes
import random
from typing import TYPE_CHECKING

from dovetail.interfaces.compiled import AttentionCall, Op, StepHeader

if TYPE_CHECKING:
    from torch import Tensor

    from dovetail_testing.attention_steps import Step

_PIECES = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)
_PIECE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32)


def operands(step: Step) -> tuple[AttentionCall, Tensor]:
    """Return the step's q, k and v in one buffer `[T, Hq + 2 Hkv, D]`, and the output `[T, Hq, D]`
    filled with NaN, as a view of wider rows."""
    import torch

    num_tokens, num_heads, head_size = step.q.shape
    num_kv_heads = step.k.shape[1]
    fused = torch.cat((step.q, step.k, step.v), 1).contiguous()
    out = step.q.new_full((num_tokens, num_heads + 1, head_size), float("nan"))
    size, at = fused.element_size() * head_size, fused.data_ptr()
    kind = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[step.q.dtype]
    stride = fused.stride(0)
    call = AttentionCall(
        at,
        at + num_heads * size,
        at + (num_heads + num_kv_heads) * size,
        out.data_ptr(),
        stride,
        stride,
        stride,
        out.stride(0),
        kind,
    )
    call.kept = (fused, out)
    return call, out[:, :num_heads]


def run_operations(ops: list[Op], attention: dict[int, int], num_tokens: int, seed: int) -> None:
    """Run operations. `attention` has the backend's `address` by layer index."""
    import torch

    rng, num_threads = random.Random(seed), torch.get_num_threads()
    addresses = (ctypes.c_void_p * (max(attention) + 1))(
        *(attention.get(i) for i in range(max(attention) + 1))
    )
    header = StepHeader(num_tokens, num_threads, None, None, ctypes.addressof(addresses))
    for op in ops:
        count = _PIECES(op.pieces)(op.self, ctypes.addressof(header))
        for piece in rng.sample(range(count), count):
            _PIECE(op.piece)(op.self, ctypes.addressof(header), piece, rng.randrange(num_threads))
