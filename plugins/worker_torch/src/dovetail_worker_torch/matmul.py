"""Products by quantized weights in plain torch, on any device: a weight is expanded for each. Slow,
obviously right."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.interfaces.matmul import Inputs, WeightFormat, dequantized
from dovetail.interfaces.quantization import LinearLayer

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}


class TorchMatmul:
    """A `Matmul`: the reference."""

    def linear(
        self, format: WeightFormat, layer: LinearLayer, tensors: Mapping[str, Tensor]
    ) -> Callable[[Tensor], Tensor]:
        kept = dict(tensors)

        def multiply(x: Tensor) -> Tensor:
            rounded = (
                x
                if format.inputs is None
                else round_inputs(x.float(), format.inputs, kept.get("input_scale"))
            )
            # Rounded inputs are not of x's dtype: their product is exact in float32 where that of
            # bfloat16 is not.
            dtype = x.dtype if format.inputs is None else torch.float32
            bias = kept["bias"].to(dtype) if layer.bias else None
            return F.linear(
                rounded, dequantized(format, layer.in_features, kept).to(dtype), bias
            ).to(x.dtype)

        return multiply

    def nbytes(self, format: WeightFormat, layer: LinearLayer) -> int:
        return format.nbytes(layer)


def round_inputs(x: Tensor, to: Inputs, scale: Tensor | None = None) -> Tensor:
    """f32[T, in] as it is once rounded: to the nearest of `scale` times an int8 or float8; by
    default each row has its own scale, by its largest value."""
    if scale is None:
        scale = x.abs().amax(1, keepdim=True) / LARGEST[to]
    scale = torch.where(scale > 0, scale, 1.0)
    limited = (x / scale).clamp(-LARGEST[to], LARGEST[to])
    rounded = limited.round() if to == "int8" else limited.to(torch.float8_e4m3fn).float()
    return rounded * scale
