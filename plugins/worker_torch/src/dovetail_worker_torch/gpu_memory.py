"""How much memory of a GPU the KV cache may take: what a profiling run leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dovetail.errors import OutOfMemory
from dovetail.interfaces.architecture import Model
from dovetail_worker_torch.drawing import Drawing

GRAPH_OVERHEAD = 256 * 2**20
"""Bytes for what captured graphs hold beside their results: the driver's own, and workspaces of matrix products."""


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of one GPU, once the weights are loaded."""

    total: int
    taken: int
    """By the weights, and by whoever else uses the GPU."""
    step: int
    """What the largest step takes beside them."""
    graphs: int

    def for_cache(self, fraction: float, num_tokens: int, num_rows: int) -> int:
        """What is left of `fraction` of all. Raises `OutOfMemory` if nothing is."""
        left = int(self.total * fraction) - self.taken - self.step - self.graphs
        if left > 0:
            return left
        needed = (self.taken + self.step + self.graphs) / self.total
        parts = (self.total, self.total * fraction, self.taken, self.step, self.graphs)
        total, allowed, taken, step, graphs = (f"{n / 2**30:.2f} GiB" for n in parts)
        enough = "" if needed >= 1 else f"raise kv_cache.memory_fraction above {needed:.2f}, "
        raise OutOfMemory(
            f"nothing is left for the KV cache: the GPU has {total}, of which {allowed} may be used (kv_cache.memory_fraction "
            f"{fraction:g}); {taken} are taken by weights and others, a step of {num_tokens} tokens and {num_rows} sequences "
            f"takes {step}, graphs {graphs}. To make room, {enough}lower scheduler.max_num_batched_tokens or "
            "scheduler.max_num_seqs, or quantize the weights"
        )


def largest_step(model: Model, drawing: Drawing, device: torch.device, num_tokens: int, num_rows: int) -> int:
    """Run a step of so many tokens and rows that sample, without a cache; bytes of its peak. Raises `OutOfMemory`."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.zeros_like(q)

    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        with torch.inference_mode():
            at = torch.arange(num_tokens, device=device)
            hidden = model.forward(torch.zeros_like(at), at, attend)
            logits = model.logits(hidden[:num_rows])
            drawing.cut_(logits, [0] * len(logits), [0.9] * len(logits))
            drawing.best(logits)
            del hidden, logits
    except torch.OutOfMemoryError as e:
        raise OutOfMemory(
            f"a step of {num_tokens} tokens and {num_rows} sequences does not fit on {device} beside the weights: lower "
            f"scheduler.max_num_batched_tokens or scheduler.max_num_seqs, or quantize the weights ({e})"
        ) from None
    peak: Any = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    return int(peak) - before


def gpu_memory(
    model: Model, drawing: Drawing, device: torch.device, num_tokens: int, num_rows: int, num_captured: int
) -> GpuMemory:
    """Profile a model whose weights are loaded; `num_captured` is the largest batch of a graph, 0 without graphs."""
    step = largest_step(model, drawing, device, num_tokens, num_rows)
    free, total = torch.cuda.mem_get_info(device)
    logits = 2 * num_captured * model.vocab_size * 4
    return GpuMemory(total, total - free, step, GRAPH_OVERHEAD + logits if num_captured else 0)
