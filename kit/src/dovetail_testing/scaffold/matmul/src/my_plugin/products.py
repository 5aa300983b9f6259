"""Compute GEMM with quantized weights: for each layer a callable with its codes and scales. Schemes
know how checkpoints store a weight; here all weights have one form, which `WeightFormat` documents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dovetail.interfaces.matmul import WeightFormat
from dovetail.interfaces.quantization import LinearLayer

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}


class MyPluginMatmul:
    """A `Matmul`; one object per engine."""

    def linear(
        self, format: WeightFormat, layer: LinearLayer, tensors: Mapping[str, Tensor]
    ) -> Callable[[Tensor], Tensor]:
        """Build the callable for `x [T, in]` → `x @ weight.T + bias`: a good place to convert the
        codes for a kernel, once."""
        kept, size = dict(tensors), format.group_size or layer.in_features

        def multiply(x: Tensor) -> Tensor:
            given = x.float() if format.inputs is None else rounded(x.float(), format, kept)
            if format.order:
                given = given[:, kept["order"]]
            codes = expanded(format, kept["codes"], layer.in_features)
            out = torch.zeros(len(x), layer.out_features, device=x.device)
            for group, begin in enumerate(range(0, layer.in_features, size)):
                own = codes[:, begin : begin + size]
                if format.zeros:
                    own = own - kept["zeros"][:, group, None].float()
                elif format.codes == "uint4":
                    own = own - 8
                out += given[:, begin : begin + size] @ own.T * kept["scales"][:, group]
            return (out + kept["bias"].float() if layer.bias else out).to(x.dtype)

        return multiply

    def nbytes(self, format: WeightFormat, layer: LinearLayer) -> int:
        """Return the bytes of the weights in memory, which are stored unchanged."""
        return format.nbytes(layer)


def expanded(format: WeightFormat, codes: Tensor, in_features: int) -> Tensor:
    """Convert codes to numbers, `f32[out, in]`."""
    if format.codes != "uint4":
        return codes.float()
    return torch.stack((codes & 15, codes >> 4), dim=2).flatten(1)[:, :in_features].float()


def rounded(x: Tensor, format: WeightFormat, tensors: Mapping[str, Tensor]) -> Tensor:
    """Quantize and dequantize x as the format requires: with a scale per row, or the format's."""
    assert format.inputs is not None
    largest = LARGEST[format.inputs]
    scale = (
        tensors["input_scale"] if format.input_scale else x.abs().amax(1, keepdim=True) / largest
    )
    limited = (x / scale.clamp_min(1e-30)).clamp(-largest, largest)
    return (
        limited.round() if format.inputs == "int8" else limited.to(torch.float8_e4m3fn).float()
    ) * scale
