"""From a model folder to a model with its weights: the architecture provider makes it, the worker
reads what it asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dovetail.errors import CheckpointError, ConfigError
from dovetail.facts import read_json
from dovetail.interfaces.architecture import (
    Architecture,
    Embedding,
    LayerMaker,
    Model,
    ModelBuild,
    Target,
)
from dovetail.interfaces.attention import AttentionLayer
from dovetail.interfaces.quantization import Part
from dovetail.interfaces.weights import LayerWeights
from dovetail.interfaces.worker import Progress
from dovetail_worker_torch.loading.checkpoint import FolderWeights, load_tensors, tensor_names
from dovetail_worker_torch.loading.quantized import QuantizedLayers


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


def describe_weights(
    folder: Path, architecture: Architecture, layers: QuantizedLayers, plain: str
) -> list[LayerWeights]:
    """The linear layers that `layers`, whose plain maker is an `Unread`, makes of the folder's
    model."""
    stored, nowhere = tensor_names(folder), torch.device("meta")
    config = read_json(folder / "config.json")
    architecture.model(
        ModelBuild(folder, config, stored, layers, torch.float32, nowhere, lambda *_: None)
    )
    layers.check(stored)
    return layers.weights(plain)


def fill_randomly(targets: Mapping[str, Target], device: torch.device, progress: Progress) -> None:
    """Vectors become ones, matrices normal numbers that keep the size of what they multiply. The
    same for every load."""
    generator = torch.Generator(device).manual_seed(0)
    for done, target in enumerate(targets.values()):
        if len(target.shape) < 2:
            target.store(torch.ones(target.shape, dtype=target.dtype, device=device))
        else:
            numbers = torch.randn(
                target.shape, dtype=target.dtype, device=device, generator=generator
            )
            target.store(numbers.mul_(target.shape[-1] ** -0.5))
        progress("making weights", done + 1, len(targets))


def load_model(
    folder: Path,
    architecture: Architecture,
    layers: LayerMaker,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
    loads_weights: bool = False,
    is_random: bool = False,
    compiled: bool = False,
    fused: bool = False,
) -> Model:
    """Make the folder's model in `dtype` on `device` and read its weights, unless `architecture`
    `loads_weights` itself, or they are to be random numbers.

    Raises `CheckpointError`, naming the file and why.
    """
    path = folder / "config.json"
    config = read_json(path)
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise CheckpointError(
            f"{path}: architectures must name the model's one architecture, found {names!r}"
        )
    if is_random and (loads_weights or config.get("quantization_config") is not None):
        raise ConfigError(
            "worker.weights: random weights are for plain checkpoints, of models that the worker"
            " reads"
        )
    stored = frozenset() if is_random else tensor_names(folder)
    files = None if is_random else FolderWeights(folder)
    model = architecture.model(
        ModelBuild(folder, config, stored, layers, dtype, device, progress, files, compiled, fused)
    )
    if is_random:
        fill_randomly(model.targets(), device, progress)
        return model
    targets, unused = model.targets(), [*model.unused()]
    if isinstance(layers, QuantizedLayers):
        layers.check(stored)
        targets, unused = targets | layers.targets(), unused + layers.unused()
    if not loads_weights:
        load_tensors(folder, targets, progress=progress, unused=unused)
    return model
