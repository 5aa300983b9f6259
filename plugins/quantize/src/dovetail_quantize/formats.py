"""Pack codes into the tensors of a checkpoint, and build its quantization_config.

| format | tensors of a layer |
|---|---|
| compressed-tensors | `weight i8 or f8_e4m3[out, in]`, `weight_scale [out, 1]` |
| gptq | `qweight i32[in * bits / 32, out]`, `qzeros i32[groups, out * bits / 32]`, `scales f16[groups, out]`, `g_idx i32[in]` |
| awq (gemm) | `qweight i32[in, out / 8]`, `qzeros i32[groups, out / 8]`, `scales f16[groups, out]` |

Version 1 of GPTQ stores zero points minus one, and version 2 stores them unchanged. Symmetric grids
are written as version 1, which all readers support. Asymmetric grids are written as version 2,
because readers differ on a zero point of 0 in version 1, and gptqmodel rejects asymmetric version 1
files that it has not written itself. AWQ interleaves the columns within a word.
"""  # noqa: E501

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dovetail_quantize.rounding import Grid, QuantizedWeight

INTERLEAVED = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of the i-th 4-bit code of a word in AWQ's gemm packing."""
WRITER = "dovetail"


def pack(codes: Tensor, bits: int, axis: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Pack codes below 2 ** bits into 32-bit words along `axis`, lowest bits first."""
    per_word = 32 // bits
    last = codes.movedim(axis, -1).to(torch.int64)
    words = last.reshape(*last.shape[:-1], -1, per_word)
    if order is not None:
        words = words[..., list(order)]
    packed = (words << torch.arange(0, 32, bits)).sum(-1)
    return (
        torch.where(packed >= 1 << 31, packed - (1 << 32), packed)
        .to(torch.int32)
        .movedim(-1, axis)
        .contiguous()
    )


def compressed_tensors(rounded: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "weight": rounded.codes.contiguous(),
        "weight_scale": rounded.scales.to(dtype).contiguous(),
    }


def gptq(rounded: QuantizedWeight, grid: Grid) -> dict[str, Tensor]:
    stored = rounded.zeros.T - 1 if gptq_version(grid) == "gptq" else rounded.zeros.T
    return {
        "qweight": pack(rounded.codes.T, grid.bits, 0),
        "qzeros": pack(stored, grid.bits, 1),
        "scales": rounded.scales.T.to(torch.float16).contiguous(),
        "g_idx": rounded.groups.clone(),
    }


def awq(rounded: QuantizedWeight) -> dict[str, Tensor]:
    return {
        "qweight": pack(rounded.codes.T, 4, 1, INTERLEAVED),
        "qzeros": pack(rounded.zeros.T, 4, 1, INTERLEAVED),
        "scales": rounded.scales.T.to(torch.float16).contiguous(),
    }


def compressed_tensors_config(
    codes: torch.dtype, weight_only: bool, ignore: list[str]
) -> dict[str, Any]:
    """Return the config for weights quantized per channel and, unless `weight_only`, activations
    quantized dynamically per token."""
    kind = "int" if codes == torch.int8 else "float"
    shared = {"num_bits": 8, "type": kind, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**shared, "strategy": "channel", "dynamic": False},
        "input_activations": (
            None if weight_only else {**shared, "strategy": "token", "dynamic": True}
        ),
        "output_activations": None,
        "format": f"{kind}-quantized",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


def gptq_version(grid: Grid) -> str:
    return "gptq" if grid.symmetric else "gptq_v2"


def gptq_config(grid: Grid, desc_act: bool, damp: float, version: str) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": grid.bits,
        "group_size": grid.group_size,
        "sym": grid.symmetric,
        "desc_act": desc_act,
        "lm_head": False,
        "checkpoint_format": gptq_version(grid),
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"{WRITER}:{version}"], "damp_percent": damp},
    }


def awq_config(grid: Grid, version: str) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": grid.bits,
        "group_size": grid.group_size,
        "zero_point": not grid.symmetric,
        "version": "gemm",
        "checkpoint_format": "gemm",
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"{WRITER}:{version}"]},
    }
