"""A scheme for tests whose layers take part in compiled steps: int8 weights, multiplied as the
worker's packed ones."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from dovetail.interfaces.quantization import (
    IN,
    OUT,
    LinearLayer,
    Parameter,
    QuantizationCapabilities,
)
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Provider


class Int8:
    unused: tuple[str, ...] = ()

    def __init__(self, context: Any, options: Any) -> None:
        self._device = context.device

    def parameters(self, layer: LinearLayer) -> dict[str, Parameter]:
        return {"codes": Parameter((OUT, IN), "int8"), "scale": Parameter((OUT,), "float32")}

    def linear(self, layer: LinearLayer, tensors: Mapping[str, Any]) -> Any:
        import torch

        from dovetail_worker_torch.loading.packed import PackedLinear
        from dovetail_worker_torch.native import Kernels

        packed = PackedLinear(
            Kernels.load(self._device),
            layer.parts,
            layer.in_features,
            layer.bias,
            getattr(torch, layer.dtype),
        )
        start, weight = 0, self.dequantize(layer, tensors)
        for part in layer.parts:
            rows = slice(start, start := start + part.out_features)
            packed.targets()[f"{part.name}.weight"].store(weight[rows])
            if layer.bias:
                packed.targets()[f"{part.name}.bias"].store(tensors["bias"][rows])
        return packed

    def kv_scales(self, name: str) -> None:
        return None

    def nbytes(self, layer: LinearLayer) -> int:
        return layer.in_features * layer.out_features * 4

    def dequantize(self, layer: LinearLayer, tensors: Mapping[str, Any]) -> Any:
        return tensors["codes"].float() * tensors["scale"][:, None]

    def quantize(self, layer: LinearLayer, weight: Any) -> dict[str, Any]:
        import torch

        scale = weight.float().abs().amax(1) / 127
        return {"codes": (weight.float() / scale[:, None]).round().to(torch.int8), "scale": scale}


@hookimpl
def dovetail_quantization() -> list[Provider[Int8]]:
    provider = partial(Provider, "kit8", "for tests", Int8)
    return [provider(capabilities=QuantizationCapabilities(on_the_fly=True, compiled_steps=True))]
