"""Implement INT8 weights with one scale per output: `weight i8[out, in]`, `weight_scale f32[out]`;
weight = code * scale."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dovetail.interfaces.matmul import Matmul, MatmulScheme, WeightFormat
from dovetail.interfaces.quantization import IN, OUT, LinearLayer, Parameter

LARGEST = 127.0


class Int8(MatmulScheme):
    """The scheme for layers that are quantized at load time, by rounding to nearest."""

    def __init__(self, matmul: Matmul, *, rounds_inputs: bool) -> None:
        super().__init__(matmul)
        self._format = WeightFormat("int8", inputs="int8" if rounds_inputs else None)

    def parameters(self, layer: LinearLayer) -> dict[str, Parameter]:
        return {
            "weight": Parameter((OUT, IN), "int8"),
            "weight_scale": Parameter((OUT,), "float32", scale="not negative"),
        }

    def format(self, layer: LinearLayer) -> WeightFormat:
        return self._format

    def canonical(self, layer: LinearLayer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"codes": tensors["weight"], "scales": tensors["weight_scale"][:, None]}

    def quantize(self, layer: LinearLayer, weight: Tensor) -> dict[str, Tensor]:
        codes, largest = quantize_rows(weight.float())
        return {"weight": codes, "weight_scale": largest / LARGEST}


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize f32[N, K] to i8[N, K]. Also returns f32[N], the largest absolute value of each row,
    which code 127 represents."""
    largest = rows.abs().amax(1)
    scale = torch.where(largest > 0, largest / LARGEST, 1.0)
    return (rows / scale[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8), largest
