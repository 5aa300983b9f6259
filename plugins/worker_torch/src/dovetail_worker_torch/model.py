"""From a model folder to a model with its weights: the architecture provider makes it, the worker reads what it asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from dovetail.errors import CheckpointError
from dovetail.facts import read_json
from dovetail.interfaces.architecture import Architecture, Attend, LayerMaker, Model, ModelBuild
from dovetail.interfaces.worker import Progress
from dovetail_worker_torch.checkpoint import load_tensors, tensor_names
from dovetail_worker_torch.quantized import QuantizedLayers


class StepAttend(Attend, Protocol):
    """An `Attend` for compiled steps too."""

    def addresses(self) -> list[int]:
        """By layer: what the operations of a compiled step read (`CompiledAttention.address`)."""


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
