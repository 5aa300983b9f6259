"""The Triton kernels behind the attention contract: work lists go to the device once a step, launches happen once a layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from dovetail.interfaces.attention import AttentionBatch, AttentionLayer, KVCacheSpec
from dovetail_attention_cuda import kernels
from dovetail_attention_cuda.cache import Cache, allocate, check, export_kv, import_kv
from dovetail_attention_cuda.schedule import I32, I64, cut_queries, is_short, most_pieces, split, whole
from dovetail_attention_cuda.shapes import LONG_PROGRAMS, SHORT_PROGRAMS, UNIT, launch, long_rows, power_of_two, short_rows

INTERPRETED_PROGRAMS = 3
"""Of a grid in Triton's interpreter: few, so that each takes several pieces."""
KINDS = {torch.int8: "int8", torch.float8_e4m3fn: "float8"}
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Geometry:
    """What layers of one plan may differ in, and the work with them."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    window: int | None

    @staticmethod
    def of(layer: AttentionLayer) -> Geometry:
        return Geometry(layer.num_heads, layer.num_kv_heads, layer.head_size, layer.window)

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


@dataclass
class Partials:
    """What the pieces of rows that were split leave for `merge`; written and read within one `run`."""

    sums: Tensor
    tops: Tensor
    weights: Tensor

    @staticmethod
    def empty(count: int, geometry: Geometry, block_m: int, device: torch.device) -> Partials:
        rows = count * geometry.num_kv_heads * block_m
        sums = torch.empty(rows, power_of_two(geometry.head_size), device=device)
        return Partials(sums, torch.empty(rows, device=device), torch.empty(rows, device=device))


@dataclass
class Work:
    """A launch of `attend`, and of `merge` if anything may be split."""

    block_m: int
    num_programs: int
    pieces: Tensor
    """i32[_, 5]"""
    num_pieces: Tensor
    """i32[1]"""
    tiles: Tensor | None = None
    """i32[num_tiles, 4]"""
    partials: Partials | None = None


@dataclass
class Step:
    """A step's work for the layers of one geometry."""

    batch: AttentionBatch
    works: list[Work]


Plan = dict[Geometry, Step]


class DecodeStep:
    """For steps of so many rows of one token each: their work, in buffers that stay where they are."""

    def __init__(self, geometry: Geometry, num_rows: int, num_programs: int, device: torch.device) -> None:
        capacity, block_m = most_pieces(num_rows, num_programs, geometry.num_kv_heads), short_rows(geometry.group)
        # One copy to the device: the number of pieces, the tiles, the pieces.
        end = 4 + num_rows * 4
        self._numbers = there = torch.zeros(end + capacity * 5, dtype=torch.int32, device=device)
        self.work = Work(
            block_m, num_programs, there[end:].view(-1, 5), there[:1], there[4:end].view(-1, 4),
            Partials.empty(capacity, geometry, block_m, device),
        )  # fmt: skip

    def write(self, pieces: I32, tiles: I32) -> Work:
        numbers = np.concatenate([[len(pieces), 0, 0, 0], tiles.ravel(), pieces.ravel()], dtype=np.int32)
        self._numbers[: len(numbers)].copy_(_staged(numbers, self._numbers.device), non_blocking=True)
        return self.work


class TritonAttention:
    """An `AttentionBackend`. One object is used by one thread at a time, on the current stream."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._is_interpreted = isinstance(kernels.attend, InterpretedFunction)
        self._num_sms = INTERPRETED_PROGRAMS
        if not self._is_interpreted:
            self._num_sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        self._decode_steps: dict[tuple[Geometry, int, int], DecodeStep] = {}
        """By geometry, a layer's index (which tells KV groups apart), and number of rows."""

    def allocate_cache(self, spec: KVCacheSpec) -> Cache:
        return allocate(spec, self.device)

    def plan(self, batch: AttentionBatch, layers: list[AttentionLayer], block_size: int) -> Plan:
        starts = np.array(batch.host_query_start[: batch.num_seqs + 1], np.int64)
        query_lens: I64 = starts[1:] - starts[:-1]
        seq_lens = np.array(batch.host_seq_lens[: batch.num_seqs], np.int64)
        found: Plan = {}
        for layer in layers:
            geometry = Geometry.of(layer)
            if geometry not in found:
                found[geometry] = Step(batch, self._works(geometry, layer.index, batch, query_lens, seq_lens))
        return found

    def _works(self, of: Geometry, index: int, batch: AttentionBatch, query_lens: I64, seq_lens: I64) -> list[Work]:
        block_m, programs = short_rows(of.group), self._num_sms * SHORT_PROGRAMS
        rows, tokens = np.arange(batch.num_seqs), block_m // of.group
        if not batch.num_seqs:
            return []
        if batch.num_tokens == batch.num_seqs:
            tiles = cut_queries(rows, query_lens, seq_lens, tokens, of.window)
            pieces, merged, _ = split(tiles, programs, of.num_kv_heads, UNIT)
            key = (of, index, batch.num_seqs)
            if key not in self._decode_steps:
                self._decode_steps[key] = DecodeStep(of, batch.num_seqs, programs, self.device)
            return [self._decode_steps[key].write(pieces, merged)]
        short, works = is_short(query_lens, tokens), []
        if short.any():
            tiles = cut_queries(rows[short], query_lens, seq_lens, tokens, of.window)
            pieces, merged, num_partials = split(tiles, programs, of.num_kv_heads, UNIT)
            work = self._once(block_m, programs, pieces)
            if num_partials:
                work.tiles, work.partials = self._copied(merged), Partials.empty(num_partials, of, block_m, self.device)
            works.append(work)
        if not short.all():
            block_m = long_rows(of.group, of.head_size)
            tiles = cut_queries(rows[~short], query_lens, seq_lens, block_m // of.group, of.window)
            works.append(self._once(block_m, self._num_sms * LONG_PROGRAMS, whole(tiles)))
        return works

    def _once(self, block_m: int, programs: int, pieces: I32) -> Work:
        return Work(block_m, programs, self._copied(pieces), self._copied(np.array([len(pieces)], np.int32)))

    def _copied(self, numbers: I32) -> Tensor:
        return _staged(numbers, self.device).to(self.device, non_blocking=True)

    def run(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, cache: Cache, plan: Plan, out: Tensor) -> None:
        step = plan[Geometry.of(layer)]
        check(layer, step.batch, q, k, v, cache, out)
        self._write(layer, k, v, cache, step.batch)
        for work in step.works:
            self._attend(layer, q, cache, step.batch, work, out)

    def _write(self, layer: AttentionLayer, k: Tensor, v: Tensor, cache: Cache, batch: AttentionBatch) -> None:
        keys, values = cache
        if not batch.num_tokens:
            return
        kernels.write_kv[(batch.num_tokens,)](
            k, v, keys, values, batch.slot_mapping, layer.kv_scales,
            k.stride(0), k.stride(1), v.stride(0), v.stride(1), keys.stride(0), keys.stride(1),
            BLOCK_SIZE=keys.shape[2], HEADS=layer.num_kv_heads, D=layer.head_size,
            WIDTH=power_of_two(layer.num_kv_heads * layer.head_size),
            KIND=KINDS.get(keys.dtype, "float"), HAS_SCALES=layer.kv_scales is not None,
            INTERPRETED=self._is_interpreted, num_warps=4,
        )  # fmt: skip

    def _attend(self, layer: AttentionLayer, q: Tensor, cache: Cache, batch: AttentionBatch, work: Work, out: Tensor) -> None:
        keys, values = cache
        table, partials = batch.block_table, work.partials
        sums, tops, weights = (partials.sums, partials.tops, partials.weights) if partials else (out, out, out)  # not written
        compute = q.dtype if keys.dtype == q.dtype or keys.dtype in KINDS else torch.float32
        how = launch(work.block_m, layer.head_size, compute.itemsize, keys.element_size())
        group, block_d = layer.num_heads // layer.num_kv_heads, power_of_two(layer.head_size)
        shape = {
            "KV_HEADS": layer.num_kv_heads, "GROUP": group, "D": layer.head_size, "BLOCK_D": block_d, "BLOCK_M": work.block_m,
            "HAS_SINKS": layer.sinks is not None, "HAS_SCALES": layer.kv_scales is not None, "INTERPRETED":
            self._is_interpreted,
        }  # fmt: skip
        kernels.attend[(work.num_programs,)](
            q, out, keys, values, table, batch.query_start, batch.seq_lens, layer.sinks, layer.kv_scales,
            work.pieces, work.num_pieces, sums, tops, weights,
            layer.scale, layer.logit_soft_cap or 0.0, layer.window or 0,
            q.stride(0), q.stride(1), out.stride(0), out.stride(1), keys.stride(0), keys.stride(1), table.stride(0),
            BLOCK_SIZE=keys.shape[2], BLOCK_N=how.block_n, HAS_CAP=layer.logit_soft_cap is not None,
            HAS_WINDOW=layer.window is not None, COMPUTE=TYPES[compute], **shape,
            num_warps=how.num_warps, num_stages=how.num_stages,
        )  # fmt: skip
        if partials is not None and work.tiles is not None:
            kernels.merge[(len(work.tiles), layer.num_kv_heads)](
                out, batch.query_start, layer.sinks, layer.kv_scales, work.tiles, sums, tops, weights,
                out.stride(0), out.stride(1), **shape, num_warps=4,
            )  # fmt: skip

    def export_kv(
        self, cache: Cache, block_ids: list[int], out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        return export_kv(cache, block_ids, out)

    def import_kv(self, cache: Cache, block_ids: list[int], keys: Tensor, values: Tensor) -> None:
        import_kv(cache, block_ids, keys, values)


def _staged(numbers: I32, device: torch.device) -> Tensor:
    """Where a copy to the device does not wait for it. PyTorch keeps pinned memory that a copy still reads from being given
    away."""
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory() if device.type == "cuda" else tensor
