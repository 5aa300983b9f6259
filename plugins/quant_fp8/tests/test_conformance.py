"""The scheme keeps the contract; checkpoints are made here from the format's description, one block at a time."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from dovetail.interfaces.quantization import LinearLayer
from dovetail.testing.quantization import QuantizationContract
from dovetail_quant_fp8 import PROVIDER

Config = dict[str, Any]


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and their scale, []."""
    scale = weight.abs().amax() / 448
    return (weight / scale.clamp_min(1e-12)).to(torch.float8_e4m3fn), scale


def pack(config: Config, layer: LinearLayer, weight: Tensor) -> dict[str, Tensor]:
    ours, theirs = ("_inv", "activation_scale") if "weight_block_size" in config else ("", "input_scale")
    codes, scale = rounded(weight)
    if block := config.get("weight_block_size"):
        rows, columns = (range(0, size, unit) for size, unit in zip(weight.shape, block, strict=True))
        scale = torch.empty(len(rows), len(columns))
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                where = slice(row, row + block[0]), slice(column, column + block[1])
                codes[where], scale[i, j] = rounded(weight[where])
    static = {theirs: torch.tensor(0.01)} if config["activation_scheme"] == "static" else {}
    return {"weight": codes, f"weight_scale{ours}": scale, **static}


class TestFp8(QuantizationContract):
    """As checkpoints say, and by default."""

    provider = PROVIDER
    pack = pack
    declined = ("lm_head",)


class TestBlocks(QuantizationContract):
    provider = PROVIDER
    configs = TestFp8.provider.capabilities.examples[:1]
    options: ClassVar = {"granularity": "block", "activations": "dynamic"}


class TestTensor(QuantizationContract):
    provider = PROVIDER
    configs = TestFp8.provider.capabilities.examples[2:3]
    options: ClassVar = {"granularity": "tensor", "activations": "none"}
