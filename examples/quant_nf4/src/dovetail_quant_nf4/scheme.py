"""Implement the NF4 scheme: two tensors per layer, from which the weight is dequantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.errors import CheckpointError
from dovetail.interfaces.quantization import OUT, Axis, Declined, LinearLayer, Parameter

Tensors = Mapping[str, Tensor]


def levels() -> Tensor:
    """Return f32[16], ascending: eight levels above zero, zero and seven below, at evenly spaced
    quantiles, scaled to ±1."""
    tail, quantile = 0.9677083, NormalDist().inv_cdf
    above = [quantile(tail + (0.5 - tail) * i / 8) for i in range(8)]
    below = [-quantile(tail + (0.5 - tail) * i / 7) for i in range(7)]
    values = torch.tensor(sorted([*above, 0.0, *below]))
    return values / values.max()


LEVELS = levels()
BOUNDS = (LEVELS[1:] + LEVELS[:-1]) / 2
PAIRS = torch.stack((LEVELS.repeat_interleave(16), LEVELS.repeat(16)), 1)
"""f32[256, 2]: the two weights of each byte. The first weight is in the high half."""


class NF4:
    """A `Scheme`. A layer has the tensors `codes u8[out, in / 2]` and `scales f16[out, in /
    block]`."""

    unused: tuple[str, ...] = ()

    def __init__(self, config: Mapping[str, Any], block_size: int) -> None:
        self._block_size: int = config.get("block_size", block_size)
        self._left_out: list[str] = config.get("modules_to_not_convert", [])

    def parameters(self, layer: LinearLayer) -> dict[str, Parameter] | Declined:
        size = self._block_size
        if layer.alike(
            self._is_left_out, "modules_to_not_convert of the checkpoint's quantization_config"
        ):
            return Declined("the checkpoint leaves it out (modules_to_not_convert)")
        if layer.in_features % size or size % 2:
            reason = f"{layer.in_features} inputs are not whole blocks of {size}"
            if layer.stored:
                raise CheckpointError(f"{layer.name} cannot be read as nf4-blocks: {reason}")
            return Declined(reason)
        return {
            "codes": Parameter((OUT, Axis("in", features=2)), "uint8"),
            "scales": Parameter((OUT, Axis("in", features=size)), "float16", scale="not negative"),
        }

    def linear(self, layer: LinearLayer, tensors: Tensors) -> Callable[[Tensor], Tensor]:
        codes, scales, bias = tensors["codes"], tensors["scales"], tensors.get("bias")
        return lambda x: F.linear(x, expand(codes, scales, PAIRS.to(x.device, x.dtype)), bias)

    def kv_scales(self, name: str) -> None:
        return None

    def nbytes(self, layer: LinearLayer) -> int:
        return (
            layer.out_features * layer.in_features // 2
            + layer.out_features * layer.in_features // self._block_size * 2
        )

    def dequantize(self, layer: LinearLayer, tensors: Tensors) -> Tensor:
        return expand(tensors["codes"], tensors["scales"], PAIRS.to(tensors["codes"].device))

    def quantize(self, layer: LinearLayer, weight: Tensor) -> dict[str, Tensor]:
        blocks = weight.float().reshape(len(weight), -1, self._block_size)
        scales = blocks.abs().amax(-1).to(torch.float16)
        # A block of zeros has the scale 0, so its codes do not matter.
        nearest = torch.bucketize(
            blocks / scales.float().clamp_min(1e-12)[..., None], BOUNDS.to(weight.device)
        )
        nearest = nearest.flatten(1).to(torch.uint8)
        return {"codes": nearest[:, 0::2] << 4 | nearest[:, 1::2], "scales": scales}

    def _is_left_out(self, name: str) -> bool:
        return any(fnmatchcase(name, glob) for glob in self._left_out)


def expand(codes: Tensor, scales: Tensor, pairs: Tensor) -> Tensor:
    """Return the weight `[out, in]` in the dtype of `pairs`."""
    values = pairs[codes.int()]  # [out, in / 2, 2]
    return (values.view(*scales.shape, -1) * scales.to(pairs.dtype)[..., None]).flatten(1)
