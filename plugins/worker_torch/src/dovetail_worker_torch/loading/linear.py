"""Linear layers and embeddings in plain torch. Model code asks a `LayerMaker` for its layers, so it
never names these."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.interfaces.architecture import Embedding, Linear, Target
from dovetail.interfaces.attention import AttentionLayer
from dovetail.interfaces.quantization import Part


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
            found[f"{part.name}.weight"] = Target.into(self.weight[rows])
            if self.bias is not None:
                found[f"{part.name}.bias"] = Target.into(self.bias[rows])
            start = rows.stop
        return found


class TorchLinears:
    """Makes unquantized layers in plain torch."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device

    def linear(self, name: str, parts: Sequence[Part], in_features: int, bias: bool) -> TorchLinear:
        out_features = sum(part.out_features for part in parts)
        weight = torch.empty(out_features, in_features, dtype=self._dtype, device=self._device)
        return TorchLinear(
            parts,
            weight,
            torch.empty(out_features, dtype=self._dtype, device=self._device) if bias else None,
        )

    def embedding(self, name: str, vocab_size: int, size: int) -> TorchLinear:
        return self.linear(name, [Part(name, vocab_size)], size, False)

    def tied(self, name: str, embedding: Embedding, of: str, vocab_size: int, size: int) -> Linear:
        return embedding

    def attention(self, name: str, layer: AttentionLayer) -> AttentionLayer:
        return layer
