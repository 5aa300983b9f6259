"""Scales for a KV cache of int8: by the largest keys and values that a model's own layers give for
random tokens.

int8 holds 255 numbers at even distances, so it needs to know how large a layer's keys and values
get. Checkpoints do not say: the scales that some hold are for float8, whose range is another.
(float8 itself does without: it is as exact, in proportion, for small numbers as for large ones, and
reaches 448.)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dovetail.interfaces.architecture import Model
from dovetail.interfaces.worker import Progress
from dovetail_worker_torch.attention import attend

NUM_SEQUENCES, LENGTH = 4, 128
HEADROOM = 1.5
"""Texts may give larger ones than random tokens do. What is larger still is cut off."""


@torch.inference_mode()
def calibrate(model: Model, max_len: int, device: torch.device, progress: Progress) -> None:
    """Give each attention layer of a model, its weights read, `kv_scales` for int8. The same each
    time."""
    layers, generator = model.attention_layers, torch.Generator().manual_seed(0)
    length = min(LENGTH, max_len)
    positions = torch.arange(length, device=device)
    largest = torch.zeros(len(layers), 2, device=device)

    def watch(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        largest[layer] = torch.maximum(
            largest[layer], torch.stack([k.abs().amax(), v.abs().amax()])
        )
        return attend(layers[layer], q, k, v, range(length), range(length)).contiguous()

    for i in range(NUM_SEQUENCES):
        progress("calibrating the KV cache", i, NUM_SEQUENCES)
        tokens = torch.randint(model.vocab_size, (length,), generator=generator)
        model.forward(tokens.to(device), positions, watch)
    progress("calibrating the KV cache", NUM_SEQUENCES, NUM_SEQUENCES)
    usable = largest.isfinite() & (
        largest > 0
    )  # a model whose weights are broken shows it later, in its logits
    scales = torch.where(usable, largest * HEADROOM / 127, 1.0)
    for i, layer in enumerate(layers):
        layers[i] = replace(layer, kv_scales=scales[i].clone())
