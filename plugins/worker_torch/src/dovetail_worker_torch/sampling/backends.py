"""The parts of a sample that look at every token of the vocabulary, in torch and in C++
(csrc/sample.cpp)."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dovetail_worker_torch.accelerator import put
from dovetail_worker_torch.native import Kernels
from dovetail_worker_torch.sampling.noise import U64, add_gumbel_noise_

MASKED = -torch.inf


class SamplerBackend(Protocol):
    """On `logits` f32[R, V]. A row that holds NaN is not usable, and nothing is promised of it."""

    def best(self, logits: Tensor) -> tuple[list[int], list[bool]]:
        """The first best token of each row, and whether the row is usable."""

    def add_gumbel_noise_(self, logits: Tensor, keys: U64) -> None:
        """Add noise, keyed by row, that makes the best token a sample (noise.py)."""

    def filter_top_k_top_p_(self, logits: Tensor, top_k: list[int], top_p: list[float]) -> None:
        """Mask what the row's top_k (0: all) and then its top_p (1: all; arXiv 1904.09751) leave
        out."""


def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`SamplerBackend.best`, left on the device: i64[R], bool[R]."""
    values, tokens = logits.max(dim=-1)  # NaN counts as the maximum, so it shows
    return tokens, ~values.isnan()


class TorchSampler:
    """Plain torch, on any device: the reference. Only `best` waits for the device."""

    def best(self, logits: Tensor) -> tuple[list[int], list[bool]]:
        tokens, usable = best(logits)
        return tokens.tolist(), usable.tolist()

    def add_gumbel_noise_(self, logits: Tensor, keys: U64) -> None:
        add_gumbel_noise_(logits, keys)

    def filter_top_k_top_p_(self, logits: Tensor, top_k: list[int], top_p: list[float]) -> None:
        vocab, device = logits.shape[1], logits.device
        if few := [i for i, k in enumerate(top_k) if 0 < k < vocab]:
            kept = [top_k[i] for i in few]
            index, last = (
                put(few, torch.int64, device),
                put([k - 1 for k in kept], torch.int64, device),
            )
            part = logits[index]
            largest = part.topk(max(kept), dim=-1).values
            logits[index] = part.masked_fill(part < largest.gather(1, last[:, None]), MASKED)
        if cut := [i for i, p in enumerate(top_p) if p < 1]:
            index = put(cut, torch.int64, device)
            ordered, order = logits[index].sort(dim=-1, descending=True, stable=True)
            probs = ordered.softmax(dim=-1)
            before = probs.cumsum(dim=-1) - probs
            limit = put([top_p[i] for i in cut], torch.float32, device)[:, None]
            ordered.masked_fill_(before >= limit, MASKED)
            logits[index] = torch.empty_like(ordered).scatter_(1, order, ordered)


class CompiledSampler:
    """The same on a CPU."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def best(self, logits: Tensor) -> tuple[list[int], list[bool]]:
        rows, vocab = logits.shape
        tokens, usable = np.empty(rows, np.int64), np.empty(rows, np.bool_)
        self._kernels.holding.dovetail_argmax(
            logits.data_ptr(),
            logits.stride(0),
            rows,
            vocab,
            tokens.ctypes.data,
            usable.ctypes.data,
            torch.get_num_threads(),
            self._kernels.team,
        )
        return tokens.tolist(), usable.tolist()

    def add_gumbel_noise_(self, logits: Tensor, keys: U64) -> None:
        rows, vocab = logits.shape
        self._kernels.functions.dovetail_add_gumbel_noise(
            logits.data_ptr(),
            logits.stride(0),
            rows,
            vocab,
            keys.ctypes.data,
            torch.get_num_threads(),
            self._kernels.team,
        )

    def filter_top_k_top_p_(self, logits: Tensor, top_k: list[int], top_p: list[float]) -> None:
        rows, vocab = logits.shape
        if all(not 0 < k < vocab for k in top_k) and all(p >= 1 for p in top_p):
            return
        k, p = np.array(top_k, np.int64), np.array(top_p, np.float32)
        self._kernels.functions.dovetail_filter_top_k_top_p(
            logits.data_ptr(),
            logits.stride(0),
            rows,
            vocab,
            k.ctypes.data,
            p.ctypes.data,
            torch.get_num_threads(),
            self._kernels.team,
        )
