"""From a model folder to a model with its weights: the architecture provider makes it, the worker reads what it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from dovetail.errors import CheckpointError
from dovetail.facts import read_json
from dovetail.interfaces.architecture import Architecture, Attend, Embedding, LayerMaker, Model, ModelBuild
from dovetail.interfaces.attention import AttentionLayer
from dovetail.interfaces.quantization import Part
from dovetail.interfaces.worker import Progress
from dovetail.weights import LayerWeights
from dovetail_worker_torch.checkpoint import load_tensors, tensor_names
from dovetail_worker_torch.quantized import QuantizedLayers


class StepAttend(Attend, Protocol):
    """An `Attend` for compiled steps too."""

    def addresses(self) -> list[int]:
        """By layer: what the operations of a compiled step read (`CompiledAttention.address`)."""


class Unread:
    """A `LayerMaker` of layers that hold nothing, to see what a model would be made of."""

    def linear(self, name: str, parts: Sequence[Part], in_features: int, bias: bool) -> Any:
        return None

    def embedding(self, name: str, vocab_size: int, size: int) -> Any:
        return None

    def tied(self, name: str, embedding: Embedding, of: str, vocab_size: int, size: int) -> Any:
        return None

    def attention(self, name: str, layer: AttentionLayer) -> AttentionLayer:
        return layer


def describe_weights(folder: Path, architecture: Architecture, layers: QuantizedLayers, plain: str) -> list[LayerWeights]:
    """The linear layers that `layers`, whose plain maker is an `Unread`, makes of the folder's model."""
    stored, nowhere = tensor_names(folder), torch.device("meta")
    config = read_json(folder / "config.json")
    architecture.model(ModelBuild(folder, config, stored, layers, torch.float32, nowhere, lambda *_: None))
    layers.check(stored)
    return layers.weights(plain)


def load_model(
    folder: Path,
    architecture: Architecture,
    layers: LayerMaker,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
    loads_weights: bool = False,
) -> Model:
    """Make the folder's model in `dtype` on `device` and read its weights, unless `architecture` `loads_weights` itself.

    Raises `CheckpointError`, naming the file and why.
    """
    path = folder / "config.json"
    config = read_json(path)
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise CheckpointError(f"{path}: architectures must name the model's one architecture, found {names!r}")
    stored = tensor_names(folder)
    model = architecture.model(ModelBuild(folder, config, stored, layers, dtype, device, progress))
    targets, unused = model.targets(), [*model.unused()]
    if isinstance(layers, QuantizedLayers):
        layers.check(stored)
        targets, unused = targets | layers.targets(), unused + layers.unused()
    if not loads_weights:
        load_tensors(folder, targets, progress=progress, unused=unused)
    return model
