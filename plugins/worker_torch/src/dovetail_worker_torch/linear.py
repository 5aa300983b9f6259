"""Linear layers, and the one place where they are made: a quantization scheme will supply its own here, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail_worker_torch.checkpoint import Target


class Part(NamedTuple):
    """One of the checkpoint's layers that a fused layer is made of: `q_proj` of `qkv_proj`."""

    name: str
    out_features: int


class LinearLayer(Protocol):
    """What a linear layer does, whatever its weights look like."""

    def __call__(self, x: Tensor) -> Tensor:
        """`x: [T, in]` -> `[T, out]`, a new tensor."""

    def targets(self) -> dict[str, Target]:
        """The checkpoint's tensors that it reads, by name."""


MakeLinear = Callable[[str, Sequence[Part], int, bool], LinearLayer]
"""make_linear(name, parts, in_features, bias): `name` is the layer's full name ("model.layers.3.mlp.down_proj"), the
parts have full names too and lie one after the other in the output."""


class Linear:
    """`x @ weight.T + bias` with `weight [out, in]` as stored."""

    def __init__(self, parts: Sequence[Part], weight: Tensor, bias: Tensor | None) -> None:
        self.parts, self.weight, self.bias = parts, weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def targets(self) -> dict[str, Target]:
        found, start = {}, 0
        for part in self.parts:
            rows = slice(start, start + part.out_features)
            found[f"{part.name}.weight"] = Target(self.weight[rows])
            if self.bias is not None:
                found[f"{part.name}.bias"] = Target(self.bias[rows])
            start = rows.stop
        return found


def linear_maker(dtype: torch.dtype, device: torch.device) -> MakeLinear:
    """A factory of unquantized layers, their weights allocated and not yet read."""

    def make_linear(name: str, parts: Sequence[Part], in_features: int, bias: bool) -> LinearLayer:
        out_features = sum(part.out_features for part in parts)
        weight = torch.empty(out_features, in_features, dtype=dtype, device=device)
        return Linear(parts, weight, torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    return make_linear
