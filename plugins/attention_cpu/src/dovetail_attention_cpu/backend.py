"""Implement the attention contract with the compiled kernel: pass tensors as pointers, and manage a
workspace that `plan` grows."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dovetail.errors import PluginError
from dovetail.interfaces.attention import AttentionBatch, AttentionLayer, KVCacheSpec
from dovetail.interfaces.compiled import AttentionCall, Compiled, Op
from dovetail.native import zeros
from dovetail_attention_cpu.ahead import Ahead

TYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int8: 3,
    torch.float8_e4m3fn: 4,
}
LONG_COST = 5e6
"""Number of multiply-adds (about 100 µs) above which a call releases the GIL. Reacquiring it can
take milliseconds if other threads are busy, which is too long for short calls once per layer."""

_i, _n, _f, _p = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "dovetail_plan": (_p, [_p, _p, _i, _i, _i, _i, _i, _i, _p, _n, _p, _i]),
    "dovetail_free": (None, [_p]),
    "dovetail_workspace_bytes": (_n, [_p]),
    "dovetail_cost": (ctypes.c_double, [_p]),
    "dovetail_set_workspace": (None, [_p, _p]),
    "dovetail_run": (None, [_p, _f, _f, _p, _p, _i, *[_p, _n, _n] * 3, _i, _p, _p, _n, _n]),
    "dovetail_compile": (_p, [_i, _i, _f, _f, _p, _p, _p, _i, _p, _p]),
    "dovetail_free_layer": (None, [_p]),
    "dovetail_copy_tokens": (None, [_i, _i, _p, _i, _i, _i, _p, _n, _p, _p]),
    "dovetail_instruction_set": (ctypes.c_char_p, []),
}


class Functions:
    """The functions of the library, with types. Those of `holding` keep the GIL."""

    def __init__(self, path: Path) -> None:
        free, holding = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
        for library in (free, holding):
            for name, (result, arguments) in SIGNATURES.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
        self.plan = holding.dovetail_plan
        self.free = holding.dovetail_free
        self.workspace_bytes = holding.dovetail_workspace_bytes
        self.cost = holding.dovetail_cost
        self.set_workspace = holding.dovetail_set_workspace
        self.compile = holding.dovetail_compile
        self.free_layer = holding.dovetail_free_layer
        self.run_short = holding.dovetail_run
        self.run_long = free.dovetail_run
        self.copy_tokens = free.dovetail_copy_tokens
        self.instruction_set: str = holding.dovetail_instruction_set().decode()


class Step:
    """The work of a step for the layers of one geometry. It owns the kernel's work list and keeps
    the tensors that the list points to alive."""

    def __init__(
        self, functions: Functions, batch: AttentionBatch, layer: AttentionLayer, block_size: int
    ) -> None:
        table, slots = batch.block_table, batch.slot_mapping
        if (
            table.dtype is not torch.int32
            or slots.dtype is not torch.int64
            or table.stride(1) != 1
            or slots.stride(0) != 1
        ):
            raise PluginError(
                "attention: block_table must be i32[B, max_blocks] and slot_mapping i64[T], with"
                " contiguous rows"
            )
        self.num_tokens = batch.host_query_start[batch.num_seqs]
        longest = max(batch.host_seq_lens[: batch.num_seqs], default=0)
        if (
            table.shape[0] < batch.num_seqs
            or table.shape[1] * block_size < longest
            or slots.shape[0] < self.num_tokens
        ):
            raise PluginError(
                f"attention: block_table {tuple(table.shape)} and slot_mapping"
                f" {tuple(slots.shape)} are too small for {batch.num_seqs} sequences of up to"
                f" {longest} tokens in blocks of {block_size}, with {self.num_tokens} new tokens"
            )
        lengths = ctypes.c_int32 * batch.num_seqs
        starts = ctypes.c_int32 * (batch.num_seqs + 1)
        self.kept = (table, slots)
        self.workspace: Tensor | None = None
        self.q_shape, self.kv_shape = (
            (layer.num_heads, layer.head_size),
            (layer.num_kv_heads, layer.head_size),
        )
        self.cache_shape = (layer.num_kv_heads, 2, block_size, layer.head_size)
        self._free: Callable[[int], None] = functions.free
        self.pointer: int = functions.plan(
            starts(*batch.host_query_start[: batch.num_seqs + 1]),
            lengths(*batch.host_seq_lens[: batch.num_seqs]),
            batch.num_seqs,
            layer.num_heads,
            layer.num_kv_heads,
            layer.head_size,
            block_size,
            layer.window or 0,
            table.data_ptr(),
            table.stride(0),
            slots.data_ptr(),
            torch.get_num_threads(),
        )
        self.run = (
            functions.run_long if functions.cost(self.pointer) > LONG_COST else functions.run_short
        )

    def __del__(self) -> None:
        if pointer := getattr(self, "pointer", None):
            self._free(pointer)


class CompiledLayer:
    """The operations of a layer for compiled steps. It owns them and keeps the tensors that they
    point to alive."""

    def __init__(self, functions: Functions, pointer: int, kept: object) -> None:
        self._free: Callable[[int], None] = functions.free_layer
        self._pointer, self._kept = pointer, kept

    def __del__(self) -> None:
        self._free(self._pointer)


Plan = dict[int, Step]
"""Steps by layer index. Layers of the same geometry share a step."""


class CpuAttention:
    """An `AttentionBackend` over the compiled kernel. One object is used by one thread at a time.

    A layer's cache is one tensor `[num_blocks, Hkv, 2, block_size, D]`: for each block and head its
    keys, then its values, each packed for vector loads (csrc/element.h), so that a head's part of a
    block is one stretch of memory.
    """

    def __init__(self, library: Path) -> None:
        self._functions = Functions(library)
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._ahead = Ahead()

    @property
    def instruction_set(self) -> str:
        return self._functions.instruction_set

    def allocate_cache(self, spec: KVCacheSpec) -> Tensor:
        _check(spec.num_kv_heads, spec.num_kv_heads, spec.head_size, spec.block_size)
        shape = (spec.num_blocks, spec.num_kv_heads, 2, spec.block_size, spec.head_size)
        dtype, count = getattr(torch, spec.dtype), math.prod(shape)
        memory = zeros(count * dtype.itemsize)
        self._ahead.add(memory, spec.num_blocks * spec.block_size)
        return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)

    def plan(self, batch: AttentionBatch, layers: list[AttentionLayer], block_size: int) -> Plan:
        if len(batch.slot_mapping):
            self._ahead.reach(int(batch.slot_mapping.max()))
        steps: dict[tuple[int, int, int, int | None], Step] = {}
        plan: Plan = {}
        for layer in layers:
            geometry = (layer.num_heads, layer.num_kv_heads, layer.head_size, layer.window)
            step = steps.get(geometry)
            if step is None:
                _check(layer.num_heads, layer.num_kv_heads, layer.head_size, block_size)
                step = steps[geometry] = Step(self._functions, batch, layer, block_size)
                self._grow(self._functions.workspace_bytes(step.pointer))
            plan[layer.index] = step
        for step in steps.values():
            self._functions.set_workspace(step.pointer, self._workspace.data_ptr())
            step.workspace = self._workspace
        return plan

    def run(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: Tensor,
        plan: Plan,
        out: Tensor,
    ) -> None:
        step = plan[layer.index]
        (qt, qh, q1), (kt, kh, k1), (vt, vh, v1), (ot, oh, o1) = (
            q.stride(),
            k.stride(),
            v.stride(),
            out.stride(),
        )
        dtype, n, kv_shape = q.dtype, step.num_tokens, step.kv_shape
        if not (q1 == k1 == v1 == o1 == 1 and k.dtype == v.dtype == out.dtype == dtype):
            raise PluginError("attention: q, k, v and out must have one dtype and contiguous heads")
        if not (
            q.shape[0] >= n <= k.shape[0]
            and v.shape[0] >= n <= out.shape[0]
            and q.shape[1:] == out.shape[1:] == step.q_shape
            and k.shape[1:] == v.shape[1:] == kv_shape
            and cache.shape[1:] == step.cache_shape
        ):
            raise PluginError(
                "attention: q and out must be [T, Hq, D], k and v [T, Hkv, D], and the cache must"
                " be that of the planned layer"
            )
        step.run(
            step.pointer,
            layer.scale,
            layer.logit_soft_cap or 0.0,
            *_pointers(layer),
            TYPES[dtype],
            q.data_ptr(),
            qt,
            qh,
            k.data_ptr(),
            kt,
            kh,
            v.data_ptr(),
            vt,
            vh,
            TYPES[cache.dtype],
            cache.data_ptr(),
            out.data_ptr(),
            ot,
            oh,
        )

    def compile(self, layer: AttentionLayer, cache: Tensor, call: AttentionCall) -> Compiled:
        _check(layer.num_heads, layer.num_kv_heads, layer.head_size, cache.shape[3])
        ops = (Op * 3)()
        pointer = self._functions.compile(
            layer.index,
            layer.head_size,
            layer.scale,
            layer.logit_soft_cap or 0.0,
            *_pointers(layer),
            ctypes.addressof(call),
            TYPES[cache.dtype],
            cache.data_ptr(),
            ctypes.addressof(ops),
        )
        return Compiled(list(ops), CompiledLayer(self._functions, pointer, (cache, layer)))

    def address(self, layer: AttentionLayer, plan: Plan) -> int:
        return plan[layer.index].pointer

    def export_kv(
        self, cache: Tensor, block_ids: list[int], out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        _, num_kv_heads, _, block_size, head_size = cache.shape
        shape = (len(block_ids), block_size, num_kv_heads, head_size)
        keys, values = torch.empty(shape, dtype=cache.dtype), torch.empty(shape, dtype=cache.dtype)
        self._copy(False, cache, block_ids, keys, values)
        return (keys, values) if out is None else (out[0].copy_(keys), out[1].copy_(values))

    def import_kv(self, cache: Tensor, block_ids: list[int], keys: Tensor, values: Tensor) -> None:
        keys, values = (x.to(device="cpu", dtype=cache.dtype).contiguous() for x in (keys, values))
        self._copy(True, cache, block_ids, keys, values)

    def _copy(
        self, to_cache: bool, cache: Tensor, block_ids: list[int], keys: Tensor, values: Tensor
    ) -> None:
        _, num_kv_heads, _, block_size, head_size = cache.shape
        slots = (
            torch.tensor(block_ids, dtype=torch.int64)[:, None] * block_size
            + torch.arange(block_size)
        ).flatten()
        self._functions.copy_tokens(
            to_cache,
            TYPES[cache.dtype],
            cache.data_ptr(),
            num_kv_heads,
            head_size,
            block_size,
            slots.data_ptr(),
            len(slots),
            keys.data_ptr(),
            values.data_ptr(),
        )

    def _grow(self, num_bytes: int) -> None:
        if num_bytes > self._workspace.numel():
            self._workspace = torch.empty(num_bytes, dtype=torch.uint8)


def _pointers(layer: AttentionLayer) -> tuple[int | None, int | None]:
    """Return the addresses of the sinks and of the KV scales, or None for those not given."""
    for tensor, what in (
        (layer.sinks, "sinks must be f32[Hq]"),
        (layer.kv_scales, "kv_scales must be f32[2]"),
    ):
        if tensor is not None and (tensor.dtype is not torch.float32 or not tensor.is_contiguous()):
            raise PluginError(f"attention: {what} and contiguous")
    sinks, scales = layer.sinks, layer.kv_scales
    return (
        None if sinks is None else sinks.data_ptr(),
        None if scales is None else scales.data_ptr(),
    )


def _check(num_heads: int, num_kv_heads: int, head_size: int, block_size: int) -> None:
    if head_size % 16 or not 16 <= head_size <= 256 or block_size % 16 or num_heads % num_kv_heads:
        raise PluginError(
            f"attention-cpu: head size {head_size} and block size {block_size} must be multiples of"
            f" 16 (heads to 256), and {num_heads} query heads a multiple of {num_kv_heads} KV"
            " heads",
            provider="attention-cpu",
        )
