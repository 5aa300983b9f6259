"""The scheme: two tensors a layer, and how they multiply. Loading, fused layers (q, k and v in
one), shards and per-layer rules follow from the two tensors that `parameters` declares, and are not
its business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dovetail.interfaces.quantization import IN, OUT, Declined, LinearLayer, Parameter

LEVELS = 127
"""Codes are from -127 to 127: symmetric, so that zero is zero."""


class MyPluginScheme:
    """A `Scheme`: one object an engine and rule."""

    unused: tuple[str, ...] = ()
    """Globs of tensors that a checkpoint may hold and nobody reads."""

    def parameters(self, layer: LinearLayer) -> dict[str, Parameter] | Declined:
        """A layer's tensors, by what follows its name in the checkpoint; each axis says whose
        features lie along it."""
        if layer.in_features < 2:
            return Declined(
                "a scale would be as large as what it scales"
            )  # the layer stays as it is, and the log says why
        return {
            "codes": Parameter((OUT, IN), "int8"),
            "scale": Parameter((OUT,), "float32", scale="not negative"),
        }

    def quantize(self, layer: LinearLayer, weight: Tensor) -> dict[str, Tensor]:
        """A plain weight `[out, in]` → the tensors declared."""
        scale = weight.float().abs().amax(1) / LEVELS
        codes = (
            weight.float() / scale.clamp_min(1e-30)[:, None]
        )  # a row of zeros has the scale 0, and codes of 0
        return {"codes": codes.round().to(torch.int8), "scale": scale}

    def dequantize(self, layer: LinearLayer, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight that the tensors stand for, `f32[out, in]`: what `linear` is held to."""
        return tensors["codes"].float() * tensors["scale"][:, None]

    def linear(
        self, layer: LinearLayer, tensors: Mapping[str, Tensor]
    ) -> Callable[[Tensor], Tensor]:
        """`x [T, in]` → `[T, out]`. Called once, with all tensors complete: the place to bring them
        into a kernel's order."""
        codes, scale, bias = tensors["codes"], tensors["scale"], tensors.get("bias")

        def multiply(x: Tensor) -> Tensor:
            out = x.float() @ codes.float().T * scale
            return (out if bias is None else out + bias.float()).to(x.dtype)

        return multiply

    def nbytes(self, layer: LinearLayer) -> int:
        """What the weights take in memory."""
        return layer.out_features * layer.in_features + layer.out_features * 4

    def kv_scales(self, name: str) -> None:
        """No scales for the KV cache."""
        return None
