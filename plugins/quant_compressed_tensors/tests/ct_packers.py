"""Layers as compressed-tensors stores them, made from the format's description with nothing of the
package or the library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Config = dict[str, Any]


def words_one_by_one(rows: list[list[int]], bits: int) -> list[list[int]]:
    """Each row's signed numbers, larger by half their range, in 32-bit words, the first in the
    lowest bits. The last word is filled up with zeros."""
    count, half, packed = 32 // bits, 2 ** (bits - 1), []
    for row in rows:
        values = [
            sum(n + half << bits * i for i, n in enumerate(row[at : at + count]))
            for at in range(0, len(row), count)
        ]
        packed.append([v - (1 << 32) if v >= 1 << 31 else v for v in values])
    return packed


def words(rows: Tensor, bits: int) -> Tensor:
    """The same, of a whole matrix: each word is a number of 32 / bits digits."""
    count = 32 // bits
    unsigned = torch.nn.functional.pad(rows.long() + 2 ** (bits - 1), (0, -rows.shape[1] % count))
    values = (
        unsigned.reshape(len(rows), -1, count)
        * torch.tensor([2 ** (bits * i) for i in range(count)])
    ).sum(2)
    return torch.where(values >= 1 << 31, values - (1 << 32), values).int()


def shape_of_scales(weights: Config, outs: int, inputs: int) -> tuple[int, int]:
    """Return the numbers of outputs and inputs that share a scale."""
    strategy = weights["strategy"]
    if strategy == "block":
        rows, columns = weights["block_structure"]
        return rows, columns
    return {
        "tensor": (outs, inputs),
        "channel": (1, inputs),
        "group": (1, weights.get("group_size", 0)),
    }[strategy]


def spread(scales: Tensor, block: tuple[int, int], outs: int, inputs: int) -> Tensor:
    """Expand one number per block to one per weight."""
    return scales[torch.arange(outs) // block[0]][:, torch.arange(inputs) // block[1]]


def make(
    config: Config, weight: Tensor, dtype: torch.dtype = torch.bfloat16, order: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors for a weight [out, in] as the config's only group stores them, and the
    dequantized weight in float32. `dtype` is that of the scales. `order` is the order of the inputs
    if there is one; the default is random."""
    group = next(iter(config["config_groups"].values()))
    weights, inputs_config, kind = group["weights"], group["input_activations"], group["format"]
    outs, inputs = weight.shape
    block = shape_of_scales(weights, outs, inputs)
    bits, is_float = weights["num_bits"], weights["type"] == "float"
    tensors: dict[str, Tensor] = {}
    back = torch.arange(inputs)
    if weights.get("actorder") == "group":
        order = (
            torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))
            if order is None
            else order
        )
        back = order.argsort()
        weight = weight[:, order]
        tensors["weight_g_idx"] = (back // block[1]).int()

    low_high = [
        [(tile.min().clamp_max(0), tile.max().clamp_min(0)) for tile in rows.split(block[1], 1)]
        for rows in weight.split(block[0])
    ]
    low, high = (torch.tensor([[pair[i] for pair in row] for row in low_high]) for i in (0, 1))
    top = 448.0 if is_float else 2.0 ** (bits - 1) - 1
    if weights.get("symmetric", True):
        scales = (torch.maximum(high, -low) / top).clamp_min(1e-6).to(dtype)
        zeros = torch.zeros_like(scales).int()
    else:
        scales = ((high - low) / (2**bits - 1)).clamp_min(1e-6).to(dtype)
        zeros = (
            (-(2 ** (bits - 1)) - low / scales.float()).round().clamp(-(2 ** (bits - 1)), top).int()
        )
    wide, wide_zeros = (
        spread(scales.float(), block, outs, inputs),
        spread(zeros, block, outs, inputs),
    )
    if is_float:
        codes = (weight / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
    else:
        codes = ((weight / wide).round() + wide_zeros).clamp(-(2 ** (bits - 1)), top).to(torch.int8)
    plain = ((codes.float() - wide_zeros) * wide)[:, back]
    codes = codes.view(torch.uint8)[:, back].view(codes.dtype)

    tensors["weight_scale"] = scales.reshape(1) if weights["strategy"] == "tensor" else scales
    if kind == "pack-quantized":
        tensors |= {"weight_packed": words(codes, bits), "weight_shape": torch.tensor(weight.shape)}
    else:
        tensors["weight"] = codes
    if not weights.get("symmetric", True):
        tensors["weight_zero_point"] = (
            words(zeros.T, bits).T.contiguous()
            if kind == "pack-quantized"
            else zeros.to(torch.int8)
        )
    if inputs_config and not inputs_config["dynamic"]:
        tensors["input_scale"] = torch.tensor([4.0 / top]).to(dtype)  # for inputs of a few units
    return tensors, plain
