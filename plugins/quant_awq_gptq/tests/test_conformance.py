"""Both formats keep the contract; their checkpoints are made here, from the formats' descriptions, one number at a time."""

from typing import Any

import torch
from torch import Tensor

from dovetail.interfaces.quantization import LinearLayer
from dovetail.testing.quantization import QuantizationContract
from dovetail_quant_awq_gptq import AWQ, GPTQ

Config = dict[str, Any]


def words(rows: list[list[int]], bits: int) -> Tensor:
    """Each row's numbers, the first in the lowest bits of its first word."""
    count, packed = 32 // bits, []
    for row in rows:
        values = [sum(n << bits * i for i, n in enumerate(row[at : at + count])) for at in range(0, len(row), count)]
        packed.append([v - (1 << 32) if v >= 1 << 31 else v for v in values])
    return torch.tensor(packed, dtype=torch.int32)


def rounded(weight: Tensor, group: int, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [out, in], zeros and scales [out, groups], to the nearest."""
    top = 2**bits - 1
    grouped = weight.reshape(len(weight), -1, group)
    low, high = grouped.amin(2).clamp_max(0), grouped.amax(2).clamp_min(0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / top).clamp_min(1e-9).half().float()
    zeros = torch.full_like(scales, (top + 1) // 2) if symmetric else (-low / scales).round().clamp(1, top)
    codes = ((grouped / scales[..., None]).round() + zeros[..., None]).clamp(0, top)
    return codes.flatten(1).int(), zeros.int(), scales


def pack_awq(config: Config, layer: LinearLayer, weight: Tensor) -> dict[str, Tensor]:
    group = layer.in_features if config["group_size"] == -1 else config["group_size"]
    codes, zeros, scales = rounded(weight, group, 4, False)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def interleaved(rows: Tensor) -> Tensor:
        return words([[row[at + i] for at in range(0, len(row), 8) for i in order] for row in rows.T.tolist()], 4)

    return {"qweight": interleaved(codes), "qzeros": interleaved(zeros), "scales": scales.T.half()}


def pack_gptq(config: Config, layer: LinearLayer, weight: Tensor) -> dict[str, Tensor]:
    group = layer.in_features if config["group_size"] == -1 else config["group_size"]
    bits, inputs = config["bits"], layer.in_features
    order = list(range(inputs))
    if config["desc_act"]:
        order = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs)).tolist()
    codes, zeros, scales = rounded(weight[:, order], group, bits, config["sym"])
    back, g_idx = [0] * inputs, [0] * inputs
    for at, k in enumerate(order):
        back[k], g_idx[k] = at, at // group
    stored = zeros - (0 if config.get("checkpoint_format") == "gptq_v2" else 1)
    return {
        "qweight": words(codes[:, back].tolist(), bits).T.contiguous(), "qzeros": words(stored.T.tolist(), bits),
        "scales": scales.T.half(), "g_idx": torch.tensor(g_idx, dtype=torch.int32),
    }  # fmt: skip


class TestAwq(QuantizationContract):
    provider = AWQ
    pack = pack_awq
    declined = ("lm_head",)


class TestGptq(QuantizationContract):
    provider = GPTQ
    pack = pack_gptq
    declined = ("lm_head",)
