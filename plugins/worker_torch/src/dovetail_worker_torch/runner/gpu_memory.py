"""How much memory of a GPU the KV cache may take: what a profiling run leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dovetail.errors import OutOfMemory
from dovetail.interfaces.architecture import Model
from dovetail_worker_torch.accelerator import Accelerator
from dovetail_worker_torch.runner.graphs import GraphLadder
from dovetail_worker_torch.sampling.backends import SamplerBackend


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of one GPU, once the weights are loaded."""

    total: int
    taken: int
    """By the weights, and by whoever else uses the GPU."""
    step: int
    """What the largest step takes beside them."""
    tables: int
    """The tables of sequences and the workspaces of attention."""
    graphs: int

    def for_cache(self, fraction: float, num_tokens: int, num_rows: int) -> int:
        """What is left of `fraction` of all. Raises `OutOfMemory` if nothing is."""
        all_but_cache = self.taken + self.step + self.tables + self.graphs
        left = int(self.total * fraction) - all_but_cache
        if left > 0:
            return left
        needed = all_but_cache / self.total
        parts = (self.total, self.total * fraction, self.taken, self.step, self.tables, self.graphs)
        total, allowed, taken, step, tables, graphs = (f"{n / 2**30:.2f} GiB" for n in parts)
        enough = "" if needed >= 1 else f"raise kv_cache.memory_fraction above {needed:.2f}, "
        raise OutOfMemory(
            f"nothing is left for the KV cache: the GPU has {total}, of which {allowed} may be used"
            f" (kv_cache.memory_fraction {fraction:g}); {taken} are taken by weights and others, a"
            f" step of {num_tokens} tokens and {num_rows} sequences takes {step}, tables of"
            f" sequences {tables}, graphs {graphs}. To make room, {enough}lower"
            " scheduler.max_num_batched_tokens or scheduler.max_num_seqs, or quantize the weights"
        )


def largest_step(
    model: Model, sampler: SamplerBackend, accelerator: Accelerator, num_tokens: int, num_rows: int
) -> int:
    """Run a step of so many tokens and rows that sample, without a cache; bytes of its peak. Raises
    `OutOfMemory`."""
    device = accelerator.device

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.zeros_like(q)

    def step() -> None:
        at = torch.arange(num_tokens, device=device)
        hidden = model.forward(torch.zeros_like(at), at, attend)
        logits = model.logits(hidden[:num_rows])
        sampler.filter_top_k_top_p_(logits, [0] * len(logits), [0.9] * len(logits))
        sampler.best(logits)

    try:
        with torch.inference_mode():
            return accelerator.peak_memory(step)
    except torch.OutOfMemoryError as e:
        raise OutOfMemory(
            f"a step of {num_tokens} tokens and {num_rows} sequences does not fit on {device}"
            " beside the weights: lower scheduler.max_num_batched_tokens or"
            f" scheduler.max_num_seqs, or quantize the weights ({e})"
        ) from None


def graph_memory(accelerator: Accelerator, new_graphs: Callable[[], GraphLadder]) -> int:
    """Bytes that capturing every size takes, from a trial of the largest, a middle and the
    smallest: what the largest takes is shared, and each other graph adds what these two did on
    average. The graphs are not kept."""
    free, _ = accelerator.memory()
    graphs, left = new_graphs(), [free]
    sizes = graphs.sizes
    for size in sorted({sizes[-1], sizes[len(sizes) // 2], sizes[0]}, reverse=True):
        graphs.capture(size)
        left.append(accelerator.memory()[0])
    largest, *others = (max(0, before - after) for before, after in pairwise(left))
    each = -(-sum(others) // len(others)) if others else 0
    return largest + each * (len(sizes) - 1)
