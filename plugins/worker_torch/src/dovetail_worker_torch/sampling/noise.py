"""Keyed noise: the randomness of a sample depends on (seed, sample index, position) and nothing
else.

A token is sampled as `argmax(logits - log(e))` with e exponential: the Gumbel-max trick, which
samples exactly from softmax(logits). So a request's tokens do not depend on the other rows, on the
order of steps, or on drafting.

The bits come from a counter-based hash: a 64-bit key a row (SplitMix64 over seed, sample index and
position) and the finalizer of MurmurHash3 over the token id, with half of the key added before and
half in the middle of it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dovetail_worker_torch.accelerator import put

U64 = npt.NDArray[np.uint64]
_CHUNK = 1 << 16  # elements: the working set stays in the L2 cache


def _i32(value: int) -> int:
    """The int32 with the same bits."""
    return value - (1 << 32) if value >= 1 << 31 else value


_GOLDEN, _MIX1, _MIX2 = _i32(0x9E3779B1), _i32(0x85EBCA6B), _i32(0xC2B2AE35)


def row_keys(
    seeds: npt.NDArray[np.int64],
    sample_indices: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
) -> U64:
    """One key a row: u64[R]. `positions` are those of the tokens to be sampled."""
    key = _splitmix(seeds.astype(np.uint64))
    key = _splitmix(key ^ sample_indices.astype(np.uint64))
    return _splitmix(key ^ positions.astype(np.uint64))


def _splitmix(x: U64) -> U64:
    """Steele, Lea, Flood: Fast splittable pseudorandom number generators (OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def add_gumbel_noise_(logits: Tensor, keys: U64) -> Tensor:
    """Subtract log(e) in place, e exponential noise keyed by row and token id. `logits` f32[R, V] →
    itself."""
    num_rows, vocab = logits.shape
    low, high = put(keys.view(np.int32).reshape(num_rows, 2).T, torch.int32, logits.device)[
        :, :, None
    ]
    width = max(1, _CHUNK // num_rows) if logits.device.type == "cpu" else vocab
    for start in range(0, vocab, width):
        part = logits[:, start : start + width]
        h = (
            torch.arange(start, start + part.shape[1], dtype=torch.int32, device=logits.device)
            * _GOLDEN
        )
        h = h + low
        h ^= (h >> 16) & 0xFFFF
        h *= _MIX1
        h ^= high
        h ^= (h >> 13) & 0x7FFFF
        h *= _MIX2
        h ^= (h >> 16) & 0xFFFF
        # 31 bits to (0, 1), both ends excluded. Small values, which win, keep all their bits: a
        # float is finest near 0.
        u = h.bitwise_and_(0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-31 * (1 - 2.0**-24))
        part -= u.neg_().log1p_().neg_().log_()
    return logits
