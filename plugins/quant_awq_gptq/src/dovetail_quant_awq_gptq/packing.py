"""Codes of 4 or 8 bits in 32-bit words, and what the canonical form makes of them. Both formats, one packing."""

from __future__ import annotations

import torch
from torch import Tensor

IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
INTERLEAVED = (0, 2, 4, 6, 1, 3, 5, 7)
"""AWQ's: the column that a word's i-th four bits are for (Lin et al., arXiv 2306.00978; the "gemm" kernel's order)."""


def unpack(words: Tensor, bits: int, axis: int, order: tuple[int, ...] = IN_ORDER) -> Tensor:
    """i32 words, each of 32 / `bits` codes along `axis` → u8, that many times as long there. The lowest bits come first."""
    moved = words.movedim(axis, -1)
    octets = moved.reshape(-1).view(torch.uint8).reshape(*moved.shape[:-1], -1)  # little-endian, as the files are
    codes = octets if bits == 8 else torch.stack([octets & 15, octets >> 4], -1).flatten(-2)
    if order != IN_ORDER:
        places = [order.index(i) for i in range(len(order))]
        codes = codes.reshape(*codes.shape[:-1], -1, len(order))[..., places].flatten(-2)
    return codes.movedim(-1, axis)


def pack(codes: Tensor, bits: int, axis: int, order: tuple[int, ...] = IN_ORDER) -> Tensor:
    """The other way round: for making checkpoints."""
    count = 32 // bits
    moved = codes.movedim(axis, -1).to(torch.int64)
    by_word = moved.reshape(*moved.shape[:-1], -1, count)[..., list(order[:count])]
    words = (by_word << torch.arange(0, 32, bits, device=codes.device)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).movedim(-1, axis)


def canonical_codes(codes: Tensor, zeros: Tensor, bits: int) -> dict[str, Tensor]:
    """`codes u8[out, in]` and `zeros u8[out, num_groups]` in the matmul socket's form."""
    if bits == 4:
        padded = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
        return {"codes": padded[:, 0::2] | padded[:, 1::2] << 4, "zeros": zeros}
    return {"codes": (codes.to(torch.int16) - 128).to(torch.int8), "zeros": (zeros.to(torch.int16) - 128).to(torch.int8)}
