# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton's language has no types that mypy knows.
"""The sampler's noise in Triton: one pass over the logits. `noise.py` is the same in torch."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail_worker_torch.accelerator import put
from dovetail_worker_torch.sampling.backends import TorchSampler
from dovetail_worker_torch.sampling.noise import U64

TOKENS_AT_A_TIME = 2048


@triton.jit
def gumbel_noise_kernel(logits, keys, row_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One program BLOCK logits of a row: subtract log(e), e exponential noise keyed by row and
    token (noise.py)."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    low = tl.load(keys + row * 2).to(tl.uint32, bitcast=True)
    high = tl.load(keys + row * 2 + 1).to(tl.uint32, bitcast=True)
    h = token.to(tl.uint32) * 0x9E3779B1 + low
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) ^ high
    h = h ^ (h >> 13)
    h = h * 0xC2B2AE35
    h = h ^ (h >> 16)
    u = ((h & 0x7FFFFFFF).to(tl.float32) + 0.5) * (
        4.656612873077393e-10 * (1 - 5.9604644775390625e-08)
    )
    # log(1 - u) to the last bit where u is small: the rounding of 1 - u is divided out again (W.
    # Kahan's way).
    rest = 1.0 - u
    exponential = tl.where(
        rest == 1.0, u, -tl.log(rest) * u / (1.0 - tl.where(rest == 1.0, 0.0, rest))
    )
    place, inside = logits + row * row_stride + token, token < SIZE
    tl.store(place, tl.load(place, mask=inside, other=0.0) - tl.log(exponential), mask=inside)


class TritonSampler(TorchSampler):
    """Noise in one pass over the logits."""

    def add_gumbel_noise_(self, logits: Tensor, keys: U64) -> None:
        rows, vocab = logits.shape
        if rows:
            halves = put(keys.view(np.int32).reshape(rows, 2), torch.int32, logits.device)
            gumbel_noise_kernel[(rows, triton.cdiv(vocab, TOKENS_AT_A_TIME))](
                logits, halves, logits.stride(0), SIZE=vocab, BLOCK=TOKENS_AT_A_TIME, num_warps=4
            )
