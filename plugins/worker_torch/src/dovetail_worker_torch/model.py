"""The seam between the runner and a model: ragged tokens in, hidden states out, attention supplied by the runner.

A step's T tokens are the rows of a ragged batch laid end to end (prefill chunks and decode tokens alike): no batch
dimension, no padding, no mask. A model knows nothing of sequences, blocks or caches; each layer hands its queries, keys
and values to `attend` and gets back what its queries saw.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dovetail.errors import CheckpointError
from dovetail.facts import read_json
from dovetail.interfaces.attention import AttentionLayer
from dovetail.interfaces.worker import Progress
from dovetail_worker_torch import decoder
from dovetail_worker_torch.linear import LinearMaker, TorchLinears


class Attend(Protocol):
    """A step's attention, for all layers."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`q [T, Hq, D]`, `k, v [T, Hkv, D]` -> `[T, Hq, D]`. Writes k and v to the layer's cache, then attends.

        All arguments are contiguous, in the model's dtype, and good for this call alone; so is the result, until the next
        call."""

    def addresses(self) -> list[int]:
        """By layer: what the operations of a compiled step read (`CompiledAttention.address`)."""


class Model(Protocol):
    """A decoder-only language model with its weights on a device."""

    attention_layers: list[AttentionLayer]
    """In order; `attention_layers[i].index == i`, and `attend` is called with each index once a forward pass."""

    vocab_size: int

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """`token_ids, positions: i64[T]` -> hidden states `[T, H]`, the final norm applied."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states `[R, H]` of the rows to sample -> `f32[R, V]`."""


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
    trust_remote_code: bool = False,
    maker: LinearMaker | None = None,
    compile: bool = False,
) -> Model:
    """Read a model folder (config.json, safetensors) into `dtype` on `device`.

    `maker` makes the linear layers of our own decoder, by default in plain torch. `compile` concerns the bridge alone: it runs
    the model through `torch.compile`.
    An architecture of `decoder.ARCHITECTURES` runs our own code; any other goes through transformers (`bridge`).
    `trust_remote_code` allows the code that a checkpoint brings along, which only the bridge can run.
    Raises `CheckpointError`, naming the file and why.
    """
    path = folder / "config.json"
    config = read_json(path)
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise CheckpointError(f"{path}: architectures must name the model's one architecture, found {architectures!r}")
    if config.get("quantization_config") is not None:
        method = config["quantization_config"].get("quant_method", "method not named")
        raise CheckpointError(f"{path}: the weights are quantized ({method}), which this worker cannot read: use the originals")
    if architectures[0] in decoder.ARCHITECTURES:
        maker = maker or TorchLinears(dtype, device)
        return decoder.load_decoder(folder, config, maker, dtype=dtype, device=device, progress=progress)

    # Not at the top: it imports transformers, which takes seconds and which our own decoder never needs.
    from dovetail_worker_torch import bridge

    model = bridge.load_bridged(folder, dtype=dtype, device=device, progress=progress, trust_remote_code=trust_remote_code)
    if compile:
        model.compile()
    return model
