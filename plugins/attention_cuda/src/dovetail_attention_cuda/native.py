"""Implement the attention contract with the CUDA C++ kernels (csrc/paged_attention.cu)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dovetail.errors import PluginError
from dovetail.interfaces.attention import AttentionBatch, AttentionLayer, KVCacheSpec
from dovetail_attention_cuda.cache import Cache, allocate, check, export_kv, import_kv

TYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int8: 3,
    torch.float8_e4m3fn: 4,
}
HEADS_AT_A_TIME = 4
"""Number of query heads that a thread block computes in most cases."""
MOST_SPLITS = 32

_p, _n, _f, _i = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int32
POINTERS = (
    "q",
    "k",
    "v",
    "out",
    "keys",
    "values",
    "query_start",
    "seq_lens",
    "table",
    "slots",
    "sinks",
    "kv_scales",
    "sums",
    "tops",
    "weights",
)
STRIDES = (
    "q_token",
    "q_head",
    "k_token",
    "k_head",
    "v_token",
    "v_head",
    "out_token",
    "out_head",
    "table_row",
)
SIZES = (
    "window",
    "type",
    "kv_type",
    "num_tokens",
    "num_rows",
    "num_heads",
    "num_kv_heads",
    "head_size",
    "block_size",
    "splits",
)


class Call(ctypes.Structure):
    """`Call` in csrc/paged_attention.cu."""

    _fields_ = [
        *((name, _p) for name in POINTERS),
        *((name, _n) for name in STRIDES),
        ("scale", _f),
        ("soft_cap", _f),
        *((name, _i) for name in SIZES),
    ]


@dataclass
class CudaPlan:
    """A step, and the number of parts into which the context of each token is split. It depends
    only on the numbers of rows and heads, so captured launches are valid for every step with as
    many rows."""

    batch: AttentionBatch
    splits: dict[int, int]
    """Number of parts by number of query heads."""


class CudaAttention:
    """An `AttentionBackend`. One object is used by one thread at a time, on the current stream.

    Its cache is that of the Triton kernels (cache.py).
    """

    def __init__(self, library: Path, device: str, num_sms: int) -> None:
        functions = ctypes.CDLL(str(library))
        self._launch: Any = functions.dovetail_paged_attention
        self._launch.argtypes = [_p, _p]
        self._error_string: Any = functions.dovetail_cuda_error
        self._error_string.restype = ctypes.c_char_p
        self.device, self._num_sms = torch.device(device), num_sms

    def allocate_cache(self, spec: KVCacheSpec) -> Cache:
        return allocate(spec, self.device)

    def plan(
        self, batch: AttentionBatch, layers: list[AttentionLayer], block_size: int
    ) -> CudaPlan:
        is_decode = batch.num_tokens == batch.num_seqs
        return CudaPlan(
            batch,
            {
                n: self._splits(batch.num_seqs, n) if is_decode else 1
                for n in {x.num_heads for x in layers}
            },
        )

    def _splits(self, num_rows: int, num_heads: int) -> int:
        """Return the number of parts that gives each multiprocessor two thread blocks."""
        blocks = max(1, num_rows * num_heads // HEADS_AT_A_TIME)
        return max(1, min(MOST_SPLITS, 2 * self._num_sms // blocks))

    def run(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: Cache,
        plan: CudaPlan,
        out: Tensor,
    ) -> None:
        batch, (keys, values) = plan.batch, cache
        check(layer, batch, q, k, v, cache, out)
        splits = plan.splits[layer.num_heads]
        partials: list[Tensor | None] = [None] * 3
        if splits > 1:
            shape = (batch.num_tokens, layer.num_heads, splits)
            partials = [
                torch.empty(*shape, *more, device=q.device) for more in ((layer.head_size,), (), ())
            ]
        tensors = (
            q,
            k,
            v,
            out,
            keys,
            values,
            batch.query_start,
            batch.seq_lens,
            batch.block_table,
            batch.slot_mapping,
            layer.sinks,
            layer.kv_scales,
            *partials,
        )
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        strides = (stride for x in (q, k, v, out) for stride in x.stride()[:2])
        call = Call(
            *pointers,
            *strides,
            batch.block_table.stride(0),
            layer.scale,
            layer.logit_soft_cap or 0.0,
            layer.window or 0,
            TYPES[q.dtype],
            TYPES[keys.dtype],
            batch.num_tokens,
            batch.num_seqs,
            layer.num_heads,
            layer.num_kv_heads,
            layer.head_size,
            keys.shape[2],
            splits,
        )
        stream = (
            torch.cuda.current_stream(self.device).cuda_stream
            if self.device.type == "cuda"
            else None
        )
        if error := self._launch(ctypes.addressof(call), stream):
            raise PluginError(
                f"attention: kernel launch failed: {self._error_string(error).decode()}",
                provider="cuda",
            )

    def export_kv(
        self, cache: Cache, block_ids: list[int], out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        return export_kv(cache, block_ids, out)

    def import_kv(self, cache: Cache, block_ids: list[int], keys: Tensor, values: Tensor) -> None:
        import_kv(cache, block_ids, keys, values)
