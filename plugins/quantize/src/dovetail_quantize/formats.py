"""How codes lie in a checkpoint, and what its config.json says of them.

| format | tensors of a layer |
|---|---|
| compressed-tensors | `weight i8 or f8_e4m3[out, in]`, `weight_scale [out, 1]` |
| gptq | `qweight i32[in * bits / 32, out]`, `qzeros i32[groups, out * bits / 32]`, `scales f16[groups, out]`, `g_idx i32[in]` |
| awq (gemm) | `qweight i32[in, out / 8]`, `qzeros i32[groups, out / 8]`, `scales f16[groups, out]` |

GPTQ's zero points are stored less one in its first version, which is written for symmetric grids:
there all readers know it. Asymmetric ones are written as the second version, which stores them as
they are: readers differ on a first version's zero point of 0, and gptqmodel takes no asymmetric one
that it has not written. The columns of a word of AWQ are interleaved.
"""  # noqa: E501

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dovetail_quantize.rounding import Grid, Rounded

INTERLEAVED = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of a word's i-th four bits in AWQ's gemm packing."""
WRITER = "dovetail"


def pack(codes: Tensor, bits: int, axis: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Codes below 2 ** bits into 32-bit words along `axis`, the lowest bits first."""
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


def compressed_tensors(rounded: Rounded, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "weight": rounded.codes.contiguous(),
        "weight_scale": rounded.scales.to(dtype).contiguous(),
    }


def gptq(rounded: Rounded, grid: Grid) -> dict[str, Tensor]:
    stored = rounded.zeros.T - 1 if gptq_version(grid) == "gptq" else rounded.zeros.T
    return {
        "qweight": pack(rounded.codes.T, grid.bits, 0),
        "qzeros": pack(stored, grid.bits, 1),
        "scales": rounded.scales.T.to(torch.float16).contiguous(),
        "g_idx": rounded.groups.clone(),
    }


def awq(rounded: Rounded) -> dict[str, Tensor]:
    return {
        "qweight": pack(rounded.codes.T, 4, 1, INTERLEAVED),
        "qzeros": pack(rounded.zeros.T, 4, 1, INTERLEAVED),
        "scales": rounded.scales.T.to(torch.float16).contiguous(),
    }


def compressed_tensors_config(
    codes: torch.dtype, weight_only: bool, ignore: list[str]
) -> dict[str, Any]:
    """Weights by channel; inputs by token, while the model runs, or not at all."""
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
