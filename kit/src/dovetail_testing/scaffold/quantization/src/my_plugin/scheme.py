"""Implement the scheme: two tensors per layer, and the GEMM. Loading, fused layers (q, k and v in
one), shards and per-layer rules follow from the two tensors that `parameters` declares and need no
code here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dovetail.interfaces.quantization import IN, OUT, Declined, LinearLayer, Parameter

LEVELS = 127
"""Codes are from -127 to 127: symmetric, so that zero is zero."""


class MyPluginScheme:
    """A `Scheme`; one object per engine and rule."""

    unused: tuple[str, ...] = ()
    """Globs of tensors that a checkpoint may contain and the scheme does not read."""

    def parameters(self, layer: LinearLayer) -> dict[str, Parameter] | Declined:
        """Return a layer's tensors, by their names in the checkpoint without the layer's name. Each
        axis declares whose features are along it."""
        # A declined layer stays unquantized, and the log has the reason.
        if layer.in_features < 2:
            return Declined("a scale would be as large as what it scales")
        return {
            "codes": Parameter((OUT, IN), "int8"),
            "scale": Parameter((OUT,), "float32", scale="not negative"),
        }

    def quantize(self, layer: LinearLayer, weight: Tensor) -> dict[str, Tensor]:
        """Convert a plain weight `[out, in]` to the declared tensors."""
        scale = weight.float().abs().amax(1) / LEVELS
        # A row of zeros has scale 0 and codes 0.
        codes = weight.float() / scale.clamp_min(1e-30)[:, None]
        return {"codes": codes.round().to(torch.int8), "scale": scale}

    def dequantize(self, layer: LinearLayer, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the weight that the tensors represent, `f32[out, in]`: the reference for
        `linear`."""
        return tensors["codes"].float() * tensors["scale"][:, None]

    def linear(
        self, layer: LinearLayer, tensors: Mapping[str, Tensor]
    ) -> Callable[[Tensor], Tensor]:
        """Build the callable for `x [T, in]` → `[T, out]`. Called once, with all tensors loaded: a
        good place to convert them for a kernel."""
        codes, scale, bias = tensors["codes"], tensors["scale"], tensors.get("bias")

        def multiply(x: Tensor) -> Tensor:
            out = x.float() @ codes.float().T * scale
            return (out if bias is None else out + bias.float()).to(x.dtype)

        return multiply

    def nbytes(self, layer: LinearLayer) -> int:
        """Return the bytes of the weights in memory."""
        return layer.out_features * layer.in_features + layer.out_features * 4

    def kv_scales(self, name: str) -> None:
        """Return None: there are no scales for the KV cache."""
        return None
