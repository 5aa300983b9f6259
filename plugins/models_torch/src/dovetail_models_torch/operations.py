"""What stands between a decoder's matrix products, in plain torch: the reference of the fused
kernels (fused.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
"""By the name in a config.json."""


class Operations(Protocol):
    """T tokens; hidden states `[T, H]` in the model's dtype. Sums are float32, and every result is
    rounded to the dtype."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`x / sqrt(mean(x²) + eps)` over the last dimension, rounded, then times weight
        (arXiv:1910.07467). A new tensor."""

    def add_rms_norm(self, hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Add `delta` to `hidden` in place; return `rms_norm` of the sum."""

    def rotated(
        self,
        qkv: Tensor,
        num_heads: int,
        num_kv_heads: int,
        norm: Tensor | None,
        eps: float,
        cos: Tensor,
        sin: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`qkv [T, Hq + 2 Hkv, D]` → q, k, v, contiguous. Heads of queries and keys are normalized
        with `norm [Hq + Hkv, D]`, if there is one, and turned by `cos, sin [T, 1, D]` of
        `RotaryEmbedding`."""

    def gated(self, gate_up: Tensor, activation: str) -> Tensor:
        """`[T, 2 F]` → `activation(first half) · second half [T, F]`."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `Operations.rms_norm`, for any shape."""
    return F.rms_norm(x, x.shape[-1:], None, eps).mul_(weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads `x: [T, heads, D]` by `cos, sin: [T, 1, D]` of `RotaryEmbedding`; pairs are (i,
    i + D/2)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class TorchOperations:
    """Plain torch, on any device."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def add_rms_norm(self, hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(hidden.add_(delta), weight, eps)

    def rotated(
        self,
        qkv: Tensor,
        num_heads: int,
        num_kv_heads: int,
        norm: Tensor | None,
        eps: float,
        cos: Tensor,
        sin: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        qk = qkv[:, : num_heads + num_kv_heads]
        if norm is not None:
            qk = rms_norm(qk, norm, eps)
        qk = rotate(qk, cos, sin)
        # Contiguous is free for one token; with more, three small copies save every backend from
        # strides.
        return (
            qk[:, :num_heads].contiguous(),
            qk[:, num_heads:].contiguous(),
            qkv[:, num_heads + num_kv_heads :].contiguous(),
        )

    def gated(self, gate_up: Tensor, activation: str) -> Tensor:
        size = gate_up.shape[1] // 2
        return ACTIVATIONS[activation](gate_up[:, :size]).mul_(gate_up[:, size:])
