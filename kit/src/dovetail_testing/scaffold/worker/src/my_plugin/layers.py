"""Provide plain linear layers for a model, and load the checkpoint's tensors into them. The
architecture provides the model's code."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dovetail.errors import CheckpointError
from dovetail.facts import read_json
from dovetail.interfaces.architecture import (
    Architecture,
    Embedding,
    Linear,
    Model,
    ModelBuild,
    Target,
)
from dovetail.interfaces.attention import AttentionLayer
from dovetail.interfaces.quantization import Part
from dovetail.interfaces.worker import Progress


class PlainLinear:
    """A `Linear`, and an `Embedding`: the same table, accessed by row."""

    def __init__(
        self, parts: Sequence[Part], in_features: int, bias: bool, dtype: torch.dtype
    ) -> None:
        out_features = sum(part.out_features for part in parts)
        self.parts = parts
        self.weight = torch.empty(out_features, in_features, dtype=dtype)
        self.bias = torch.empty(out_features, dtype=dtype) if bias else None

    def __call__(self, x: Tensor, dtype: Any = None) -> Tensor:
        return F.linear(x, self.weight, self.bias).to(dtype or x.dtype)

    def rows(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weight)

    def targets(self) -> dict[str, Target]:
        """Return targets with which each of the checkpoint's layers fills its rows of the fused
        one."""
        found, start = {}, 0
        for part in self.parts:
            rows = slice(start, start := start + part.out_features)
            found[f"{part.name}.weight"] = Target.into(self.weight[rows])
            if self.bias is not None:
                found[f"{part.name}.bias"] = Target.into(self.bias[rows])
        return found


class PlainLayers:
    """A `LayerMaker`. Support for quantized or packed layers would be added here."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def linear(self, name: str, parts: Sequence[Part], in_features: int, bias: bool) -> PlainLinear:
        return PlainLinear(parts, in_features, bias, self.dtype)

    def embedding(self, name: str, vocab_size: int, size: int) -> PlainLinear:
        return PlainLinear([Part(name, vocab_size)], size, False, self.dtype)

    def tied(self, name: str, embedding: Embedding, of: str, vocab_size: int, size: int) -> Linear:
        return embedding

    def attention(self, name: str, layer: AttentionLayer) -> AttentionLayer:
        return layer


def load_model(
    folder: Path, architecture: Architecture, dtype: torch.dtype, progress: Progress
) -> Model:
    """Build the folder's model and load its weights. Raises `CheckpointError`, which names the file
    or the tensor."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no weights (*.safetensors)")
    try:
        shards: dict[Path, Any] = {
            path: safe_open(path, framework="pt", device="cpu") for path in files
        }
    except (SafetensorError, OSError) as e:
        raise CheckpointError(
            f"{folder}: the weights are truncated or not safetensors: {e}"
        ) from None
    where = {name: path for path, shard in shards.items() for name in shard.keys()}  # noqa: SIM118
    config = read_json(folder / "config.json")
    build = ModelBuild(
        folder, config, frozenset(where), PlainLayers(dtype), dtype, torch.device("cpu"), progress
    )
    model = architecture.model(build)
    targets = model.targets()
    if missing := sorted(set(targets) - set(where)):
        raise CheckpointError(f"{folder} lacks {', '.join(missing[:5])}, which the model needs")
    unknown = [
        n
        for n in sorted(set(where) - set(targets))
        if not any(fnmatchcase(n, glob) for glob in model.unused())
    ]
    if unknown:
        raise CheckpointError(
            f"{folder} contains {', '.join(unknown[:5])}, which the model does not have"
        )
    for done, (name, target) in enumerate(targets.items(), 1):
        tensor = shards[where[name]].get_tensor(name)
        if tuple(tensor.shape) != target.shape:
            raise CheckpointError(
                f"{where[name]}: {name} has shape {list(tensor.shape)}, not {list(target.shape)}"
            )
        target.store(tensor)
        progress("loading weights", done, len(targets))
    return model
