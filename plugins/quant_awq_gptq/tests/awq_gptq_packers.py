"""Write AWQ and GPTQ checkpoints as the formats are documented, without code of the package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Config = dict[str, Any]
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Columns (of eight) of the codes in a word, lowest bits first."""


def words_one_by_one(rows: list[list[int]], bits: int, minus: int = 0) -> list[list[int]]:
    """Each row's numbers in 32-bit words, the first in the lowest bits; `minus` is subtracted from
    every number as tools do it: from the words, so that a 0 borrows from the next number."""
    count, packed = 32 // bits, []
    less = sum(minus << bits * i for i in range(count))
    for row in rows:
        values = [
            sum(n << bits * i for i, n in enumerate(row[at : at + count]))
            for at in range(0, len(row), count)
        ]
        unsigned = [(v - less) % (1 << 32) for v in values]
        packed.append([v - (1 << 32) if v >= 1 << 31 else v for v in unsigned])
    return packed


def words(rows: Tensor, bits: int, minus: int = 0) -> Tensor:
    """The same, of a whole matrix: each word is a number of 32 / bits digits."""
    count = 32 // bits
    digits = torch.tensor([2 ** (bits * i) for i in range(count)])
    values = (rows.long().reshape(len(rows), -1, count) * digits).sum(2) - minus * int(digits.sum())
    unsigned = values % (1 << 32)
    return torch.where(unsigned >= 1 << 31, unsigned - (1 << 32), unsigned).int()


def rounded(
    weight: Tensor, group: int, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes [out, in], zeros and scales [out, groups], rounded to nearest. The last group
    may be smaller."""
    top = 2**bits - 1
    grouped = [weight[:, at : at + group] for at in range(0, weight.shape[1], group)]
    low = torch.stack([g.amin(1) for g in grouped], 1).clamp_max(0)
    high = torch.stack([g.amax(1) for g in grouped], 1).clamp_min(0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / top).clamp_min(1e-5).half().float()
    zeros = (
        torch.full_like(scales, (top + 1) // 2)
        if symmetric
        else (-low / scales).round().clamp(0, top)
    )
    wide_scales, wide_zeros = (spread(t, group, weight.shape[1]) for t in (scales, zeros))
    codes = ((weight / wide_scales).round() + wide_zeros).clamp(0, top)
    return codes.int(), zeros.int(), scales


def spread(by_group: Tensor, group: int, inputs: int) -> Tensor:
    """Expand [out, groups] to [out, in]."""
    return by_group[:, torch.arange(inputs) // group]


def make_awq(config: Config, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a plain weight [out, in], and the weight that they stand for, in float32."""
    group = weight.shape[1] if config["group_size"] == -1 else config["group_size"]
    codes, zeros, scales = rounded(weight, group, 4, False)

    def interleaved(rows: Tensor) -> Tensor:
        return words(rows.T.reshape(rows.shape[1], -1, 8)[:, :, AWQ_ORDER].flatten(1), 4)

    tensors = {
        "qweight": interleaved(codes),
        "qzeros": interleaved(zeros),
        "scales": scales.T.half().contiguous(),
    }
    inputs = weight.shape[1]
    return tensors, (codes - spread(zeros, group, inputs)) * spread(scales, group, inputs)


def make_gptq(
    config: Config, weight: Tensor, seed: int | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors for a weight [out, in], and the dequantized weight in float32. `seed`
    determines the order of inputs with desc_act; the default is the number of inputs."""
    bits, inputs = config["bits"], weight.shape[1]
    group = inputs if config["group_size"] == -1 else config["group_size"]
    order = torch.arange(inputs)
    if config["desc_act"]:
        order = torch.randperm(
            inputs, generator=torch.Generator().manual_seed(inputs if seed is None else seed)
        )
    codes, zeros, scales = rounded(weight[:, order], group, bits, config["sym"])
    back = order.argsort()  # position of each input in that order
    tensors = {
        "qweight": words(codes[:, back], bits).T.contiguous(),
        "qzeros": words(zeros.T, bits, 0 if config.get("checkpoint_format") == "gptq_v2" else 1),
        "scales": scales.T.half().contiguous(),
        "g_idx": (back // group).int(),
    }
    plain = (codes - spread(zeros, group, inputs)) * spread(scales, group, inputs)
    return tensors, plain[:, back]
