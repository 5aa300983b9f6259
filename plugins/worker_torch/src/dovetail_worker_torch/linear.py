"""Linear layers and embeddings, and the one place where they are made: a quantization scheme will supply its own here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail_worker_torch.checkpoint import Target, into


class Part(NamedTuple):
    """One of the checkpoint's layers that a fused layer is made of: `q_proj` of `qkv_proj`."""

    name: str
    out_features: int


class LinearLayer(Protocol):
    """What a linear layer does, whatever its weights look like."""

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """`x: [T, in]` -> `[T, out]`, a new tensor of `dtype`, by default x's."""

    def targets(self) -> dict[str, Target]:
        """The checkpoint's tensors that it reads, by name."""


class Embedding(LinearLayer, Protocol):
    """A table of vectors by token id, which may also be the output projection."""

    def rows(self, token_ids: Tensor) -> Tensor:
        """`i64[T]` -> `[T, in]`, a new tensor."""


class LinearMaker(Protocol):
    """Makes a model's layers, their weights allocated and not yet read."""

    def linear(self, name: str, parts: Sequence[Part], in_features: int, bias: bool) -> LinearLayer:
        """`name` is the layer's full name ("model.layers.3.mlp.down_proj"); the parts have full names too and lie one
        after the other in the output."""

    def embedding(self, name: str, vocab_size: int, size: int) -> Embedding: ...


class TorchLinear:
    """`x @ weight.T + bias` with `weight [out, in]` as stored."""

    def __init__(self, parts: Sequence[Part], weight: Tensor, bias: Tensor | None) -> None:
        self.parts, self.weight, self.bias = parts, weight, bias

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return F.linear(x, self.weight, self.bias).to(dtype or x.dtype)

    def rows(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weight)

    def targets(self) -> dict[str, Target]:
        found, start = {}, 0
        for part in self.parts:
            rows = slice(start, start + part.out_features)
            found[f"{part.name}.weight"] = into(self.weight[rows])
            if self.bias is not None:
                found[f"{part.name}.bias"] = into(self.bias[rows])
            start = rows.stop
        return found


class TorchLinears:
    """Unquantized layers in plain torch."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device

    def linear(self, name: str, parts: Sequence[Part], in_features: int, bias: bool) -> TorchLinear:
        out_features = sum(part.out_features for part in parts)
        weight = torch.empty(out_features, in_features, dtype=self._dtype, device=self._device)
        return TorchLinear(parts, weight, torch.empty(out_features, dtype=self._dtype, device=self._device) if bias else None)

    def embedding(self, name: str, vocab_size: int, size: int) -> TorchLinear:
        return self.linear(name, [Part(name, vocab_size)], size, False)
