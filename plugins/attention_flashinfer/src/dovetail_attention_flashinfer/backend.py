"""Implement the attention contract with FlashInfer's wrappers, which plan once per step and
geometry and run once per layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dovetail.errors import PluginError
from dovetail.interfaces.attention import AttentionBatch, AttentionLayer, KVCacheSpec
from dovetail_attention_flashinfer.options import FlashInferOptions
from dovetail_attention_flashinfer.work import (
    LAYOUT,
    DecodeWork,
    Geometry,
    RaggedWork,
    Types,
    Work,
    rounded_width,
)
from dovetail_attention_flashinfer.workspace import workspace_bytes

LARGEST_FP8 = 448.0
MOST_EAGER = 16
"""Maximum number of cached `DecodeWork`s that no graph has captured. Each has a buffer of 1 MiB and
its page numbers."""
Cache = tuple[Tensor, Tensor]


@dataclass
class Step:
    """The work of a step for the layers of one geometry."""

    batch: AttentionBatch
    work: Work
    first: int
    """Index of the layer whose `run` gathers the page numbers for the others. It does so in each
    run, because the run may be captured. If this layer is not run, the first layer that runs
    gathers them."""


Plan = dict[Geometry, Step]


@dataclass(frozen=True)
class WholeCache:
    """A cache described as one sequence of all its blocks, so that slots are positions, as
    FlashInfer's append expects them."""

    indices: Tensor
    indptr: Tensor
    last_len: Tensor

    @staticmethod
    def of(num_blocks: int, block_size: int, device: torch.device) -> WholeCache:
        indices = torch.arange(num_blocks, dtype=torch.int32, device=device)
        ends = torch.tensor([0, num_blocks, block_size], dtype=torch.int32, device=device)
        return WholeCache(indices, ends[:2], ends[2:])


class FlashInferAttention:
    """An `AttentionBackend`. One object is used by one thread at a time, on the current stream. The
    first of a plan's layers with one geometry runs first.

    The cache of a layer is two tensors, keys and values, each `[num_blocks, block_size, Hkv, D]`,
    the canonical layout.
    """

    def __init__(
        self, device: str, options: FlashInferOptions, flashinfer: Any, max_num_seqs: int
    ) -> None:
        """Create the backend. `flashinfer` is the module, and `max_num_seqs` is the maximum number
        of rows of a decode step, captured or not."""
        self.device, self._options, self._flashinfer = torch.device(device), options, flashinfer
        self._max_num_seqs, self._num_sms = max_num_seqs, 1
        if self.device.type == "cuda":
            self._num_sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        self._workspace: Tensor | None = None
        """Partial results within one run. All wrappers share it, because runs are in order on a
        stream."""
        self._ragged: dict[tuple[Geometry, int, int], Work] = {}
        """By geometry, block size and index of the first layer, which identifies the KV group."""
        self._decodes: dict[tuple[Geometry, int, int, int, int], DecodeWork] = {}
        """By the same keys, number of rows and `rounded_width` of the block table. The most
        recently used entry is last."""
        self._types: Types | None = None
        """Dtypes of the previous run."""
        self._caches: dict[tuple[int, int], WholeCache] = {}
        self._scales: dict[int, tuple[Tensor, float, float]] = {}
        """By layer index: the scales on the device and their values on the host."""

    def allocate_cache(self, spec: KVCacheSpec) -> Cache:
        shape = (spec.num_blocks, spec.block_size, spec.num_kv_heads, spec.head_size)
        dtype, key = getattr(torch, spec.dtype), (spec.num_blocks, spec.block_size)
        if key not in self._caches:
            self._caches[key] = WholeCache.of(*key, self.device)
        return torch.zeros(shape, dtype=dtype, device=self.device), torch.zeros(
            shape, dtype=dtype, device=self.device
        )

    def plan(self, batch: AttentionBatch, layers: list[AttentionLayer], block_size: int) -> Plan:
        found: Plan = {}
        if batch.num_seqs:
            self._allocate_workspace({Geometry.of(layer) for layer in layers}, batch.num_seqs)
        for layer in layers if batch.num_seqs else ():
            self._host_scales(layer)
            geometry = Geometry.of(layer)
            if geometry not in found:
                work = self._work(geometry, block_size, layer.index, batch)
                work.prepare(batch, self._types)
                found[geometry] = Step(batch, work, layer.index)
        return found

    def _allocate_workspace(self, geometries: set[Geometry], num_rows: int) -> None:
        """Allocate the workspace for the largest step of these layers (workspace.py), at their
        first plan.

        The layers are known at the first plan at the earliest, which precedes any capture, because
        the worker plans outside of captures. If later layers need more, they get a larger
        workspace. Existing works keep theirs, which is large enough for all of their steps, so that
        no captured address is freed.
        """
        if self._options.workspace_mb is not None:
            needed = self._options.workspace_mb << 20
        else:
            rows = max(
                self._max_num_seqs,
                1 << (num_rows - 1).bit_length() if num_rows > self._max_num_seqs else 0,
            )
            needed = max(workspace_bytes(of, rows, self._num_sms) for of in geometries)
        if self._workspace is None or needed > self._workspace.nbytes:
            self._workspace = torch.zeros(needed, dtype=torch.uint8, device=self.device)

    def _work(self, geometry: Geometry, block_size: int, index: int, batch: AttentionBatch) -> Work:
        assert self._workspace is not None
        common = (self._flashinfer, self._workspace, geometry, block_size)
        if batch.num_tokens > batch.num_seqs:
            key = (geometry, block_size, index)
            if key not in self._ragged:
                self._ragged[key] = RaggedWork(*common, self._options.backend)
            return self._ragged[key]
        width = rounded_width(batch.block_table.shape[1])
        sized = (geometry, block_size, index, batch.num_seqs, width)
        work = self._decodes.pop(sized, None) or DecodeWork(*common, batch.num_seqs, width)
        self._decodes[sized] = work
        self._evict()
        return work

    def _evict(self) -> None:
        """Remove the least recently used decode works that no graph has captured."""
        eager = [key for key, work in self._decodes.items() if not work.is_captured]
        for key in eager[: max(0, len(eager) - MOST_EAGER)]:
            self._decodes.pop(key).close()

    def _is_capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def run(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: Cache,
        plan: Plan,
        out: Tensor,
    ) -> None:
        if not plan:
            return
        step = plan[Geometry.of(layer)]
        work, n = step.work, step.batch.num_tokens
        _check(layer, n, q, k, v, cache, out)
        work.is_captured = work.is_captured or self._is_capturing()
        self._types = types = Types.of(q, cache[0])
        wrapper = work.wrapper(types)
        if layer.index == step.first or not work.is_gathered:
            work.gather(step.batch)
        self._write(layer, k[:n], v[:n], cache, work)
        scales = self._host_scales(layer)
        is_direct = out.dtype == types.q and out.is_contiguous()
        target = (
            out[:n]
            if is_direct
            else torch.empty((n, *out.shape[1:]), dtype=types.q, device=out.device)
        )
        paged = tuple(x.view(-1, work.page_size, *x.shape[2:]) for x in cache)
        wrapper.run(
            q[:n].to(types.q),
            paged,
            k_scale=scales and scales[0],
            v_scale=scales and scales[1],
            out=target,
        )
        if not is_direct:
            out[:n] = target

    def _write(self, layer: AttentionLayer, k: Tensor, v: Tensor, cache: Cache, work: Work) -> None:
        keys, values = _stored(k, v, cache[0].dtype, layer.kv_scales)
        whole = self._caches[cache[0].shape[0], cache[0].shape[1]]
        self._flashinfer.append_paged_kv_cache(
            keys,
            values,
            work.zero_rows,
            work.slots,
            cache,
            whole.indices,
            whole.indptr,
            whole.last_len,
            kv_layout=LAYOUT,
        )

    def _host_scales(self, layer: AttentionLayer) -> tuple[float, float] | None:
        """Return the KV scales as numbers, which FlashInfer requires. They are read from the device
        once."""
        if layer.kv_scales is None:
            return None
        known = self._scales.get(layer.index)
        if known is None or known[0] is not layer.kv_scales:
            known = (layer.kv_scales, *layer.kv_scales.tolist())
            self._scales[layer.index] = known
        return known[1:]

    def export_kv(
        self, cache: Cache, block_ids: list[int], out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        index = torch.tensor(block_ids, dtype=torch.int64, device=self.device)
        keys, values = (x[index] for x in cache)
        return (keys, values) if out is None else (out[0].copy_(keys), out[1].copy_(values))

    def import_kv(self, cache: Cache, block_ids: list[int], keys: Tensor, values: Tensor) -> None:
        index = torch.tensor(block_ids, dtype=torch.int64, device=self.device)
        for own, given in zip(cache, (keys, values), strict=True):
            own[index] = given.to(device=self.device, dtype=own.dtype)


def _stored(
    k: Tensor, v: Tensor, dtype: torch.dtype, scales: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Convert keys and values to the dtype of the cache."""
    if dtype.itemsize > 1:
        return k.to(dtype), v.to(dtype)
    both = torch.stack([k, v]).float()
    if scales is not None:
        both /= scales.view(2, 1, 1, 1)
    keys, values = both.clamp_(-LARGEST_FP8, LARGEST_FP8).to(dtype)
    return keys, values


def _check(
    layer: AttentionLayer, n: int, q: Tensor, k: Tensor, v: Tensor, cache: Cache, out: Tensor
) -> None:
    """Raise `PluginError` if a tensor has a shape, dtype or stride that FlashInfer does not
    support."""
    heads, kv = (layer.num_heads, layer.head_size), (layer.num_kv_heads, layer.head_size)
    if not (
        q.stride(2) == k.stride(2) == v.stride(2) == 1
        and k.dtype == v.dtype == out.dtype == q.dtype
    ):
        raise PluginError("attention: q, k, v and out must have one dtype and contiguous heads")
    if not (
        q.shape[0] >= n <= k.shape[0]
        and v.shape[0] >= n <= out.shape[0]
        and q.shape[1:] == out.shape[1:] == heads
        and k.shape[1:] == v.shape[1:] == kv
        and all(tuple(x.shape[2:]) == kv for x in cache)
    ):
        raise PluginError(
            "attention: q and out must be [T, Hq, D], k and v [T, Hkv, D], and the cache must be"
            " that of the planned layer"
        )
