"""Dequantize checkpoints element by element, as their formats are documented, without code of the
plugin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def bits_of(word: int, index: int, bits: int) -> int:
    return ((word % 2**32) >> (bits * index)) % 2**bits


def gptq(tensors: dict[str, Tensor], bits: int, version: str) -> Tensor:
    """Dequantize a GPTQ weight. Rows of a column share words, and g_idx is the group of each input.
    Version 1 stores zero points minus one."""
    offset = {"gptq": 1, "gptq_v2": 0}[version]
    qweight, qzeros = tensors["qweight"].tolist(), tensors["qzeros"].tolist()
    scales, g_idx, per_word = tensors["scales"].float(), tensors["g_idx"].tolist(), 32 // bits
    num_in, num_out = len(g_idx), scales.shape[1]
    weight = torch.empty(num_out, num_in)
    for i in range(num_in):
        for o in range(num_out):
            code = bits_of(qweight[i // per_word][o], i % per_word, bits)
            zero = bits_of(qzeros[g_idx[i]][o // per_word], o % per_word, bits) + offset
            weight[o, i] = (code - zero) * scales[g_idx[i], o]
    return weight


def awq(tensors: dict[str, Tensor], group_size: int) -> Tensor:
    """Dequantize an AWQ weight in AutoAWQ's gemm format. Columns share words in an interleaved
    order."""
    qweight, qzeros, scales = (
        tensors["qweight"].tolist(),
        tensors["qzeros"].tolist(),
        tensors["scales"].float(),
    )
    num_in, num_out = len(qweight), scales.shape[1]
    group_size = num_in if group_size == -1 else group_size
    weight = torch.empty(num_out, num_in)
    for i in range(num_in):
        for o in range(num_out):
            place = AWQ_ORDER.index(o % 8)
            code, zero = (
                bits_of(qweight[i][o // 8], place, 4),
                bits_of(qzeros[i // group_size][o // 8], place, 4),
            )
            weight[o, i] = (code - zero) * scales[i // group_size, o]
    return weight


def compressed(tensors: dict[str, Tensor]) -> Tensor:
    return tensors["weight"].float() * tensors["weight_scale"].float()


def read(folder: Path) -> dict[str, Tensor]:
    """Return all weights of a checkpoint, dequantized to float32."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    stored: dict[str, Tensor] = {}
    for file in set(weight_map.values()):
        stored.update(load_file(folder / file))
    assert stored.keys() == weight_map.keys()
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        layers.setdefault(name.rpartition(".")[0], {})[name.rpartition(".")[2]] = tensor
    found = {}
    for name, tensors in layers.items():
        if "qweight" in tensors:
            if config["quant_method"] == "gptq":
                found[f"{name}.weight"] = gptq(tensors, config["bits"], config["checkpoint_format"])
            else:
                found[f"{name}.weight"] = awq(tensors, config["group_size"])
        elif "weight_scale" in tensors:
            found[f"{name}.weight"] = compressed(tensors)
        else:
            found[f"{name}.weight"] = tensors["weight"].float()
    return found
