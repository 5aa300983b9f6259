"""Implement the attention contract with the Triton kernels: work lists are copied to the device
once per step, kernels are launched once per layer."""

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
from dovetail_attention_cuda.schedule import (
    I32,
    I64,
    cut_queries,
    is_short,
    most_pieces,
    split,
    whole,
)
from dovetail_attention_cuda.shapes import (
    LONG_PROGRAMS,
    SHORT_PROGRAMS,
    UNIT,
    launch,
    long_rows,
    power_of_two,
    short_rows,
)

INTERPRETED_PROGRAMS = 3
"""Number of programs of a grid in Triton's interpreter. It is small, so that each program processes
several pieces."""
KINDS = {torch.int8: "int8", torch.float8_e4m3fn: "float8"}
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Geometry:
    """The properties in which layers of one plan may differ and on which the work list depends."""

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
    """Partial results of split rows, from `attend` to `merge`, written and read within one `run`.

    `count` pieces of `Hkv` heads and `block_m` rows each take `R = count * Hkv * block_m` rows of
    one float32 buffer.
    """

    sums: Tensor
    """f32[R, D], where D is the head size rounded up to a power of two."""
    tops: Tensor
    """f32[R]"""
    weights: Tensor
    """f32[R]"""

    @staticmethod
    def numbers(count: int, geometry: Geometry, block_m: int) -> int:
        """Return the number of elements that `count` pieces need."""
        return count * geometry.num_kv_heads * block_m * (power_of_two(geometry.head_size) + 2)

    @staticmethod
    def within(buffer: Tensor, count: int, geometry: Geometry, block_m: int) -> Partials:
        """Return views of `buffer`, f32 with at least `numbers(…)` elements."""
        rows, size = count * geometry.num_kv_heads * block_m, power_of_two(geometry.head_size)
        sums, tops, weights = buffer[: rows * (size + 2)].split([rows * size, rows, rows])
        return Partials(sums.view(rows, size), tops, weights)


class GrowingBuffer:
    """Device memory that steps of all sizes share. Each use ends on the stream before the next one
    begins.

    Memory that a captured graph uses must neither move nor be freed, and a backend does not know
    what is captured. A buffer that was returned is therefore kept for the lifetime of this object.
    A larger request allocates another buffer, which serves all later requests. Each buffer is at
    least twice as large as the one before, so all of them together are less than twice the last
    one. The worker captures its largest batch first, so usually there is one buffer, but
    correctness does not depend on this order.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._buffers: list[Tensor] = []

    @property
    def capacity(self) -> int:
        """Number of elements that are available without allocating."""
        return len(self._buffers[-1]) if self._buffers else 0

    def of(self, count: int) -> Tensor:
        """Return at least `count` elements at a stable address."""
        if count > self.capacity:
            size = max(count, 2 * self.capacity)
            self._buffers.append(torch.zeros(size, dtype=self._dtype, device=self._device))
        return self._buffers[-1]


@dataclass
class Work:
    """A launch of `attend`, and of `merge` if rows may be split."""

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
    """The work of a step for the layers of one geometry."""

    batch: AttentionBatch
    works: list[Work]


Plan = dict[Geometry, Step]


class DecodeSteps:
    """Work of steps with one token per row, for one geometry and KV group, at stable addresses per
    number of rows.

    Steps of all sizes share one buffer of work lists, because `plan` writes the list of a step and
    it is read before the next `plan` of its group. All geometries share one buffer of partial
    results, because each `run` writes them before it reads them.
    """

    def __init__(
        self, geometry: Geometry, num_programs: int, partials: GrowingBuffer, device: torch.device
    ) -> None:
        self._geometry, self._num_programs, self._partials = geometry, num_programs, partials
        self._numbers = GrowingBuffer(torch.int32, device)
        self._works: dict[int, tuple[Tensor, Work]] = {}
        """By number of rows: the buffer of the work list, and the work with views of it. A captured
        graph reads the buffer, so entries are never removed."""

    def write(self, num_rows: int, pieces: I32, tiles: I32) -> Work:
        if num_rows not in self._works:
            self._works[num_rows] = self._work(num_rows)
        there, work = self._works[num_rows]
        numbers = np.concatenate(
            [[len(pieces), 0, 0, 0], tiles.ravel(), pieces.ravel()], dtype=np.int32
        )
        there[: len(numbers)].copy_(_staged(numbers, there.device), non_blocking=True)
        return work

    def _work(self, num_rows: int) -> tuple[Tensor, Work]:
        of, block_m = self._geometry, short_rows(self._geometry.group)
        capacity = most_pieces(num_rows, self._num_programs, of.num_kv_heads)
        # The number of pieces, the tiles and the pieces are contiguous, for one copy to the device.
        tiles, end = 4 + num_rows * 4, 4 + num_rows * 4 + capacity * 5
        there = self._numbers.of(end)[:end]
        partials = Partials.within(
            self._partials.of(Partials.numbers(capacity, of, block_m)), capacity, of, block_m
        )
        pieces = there[tiles:].view(-1, 5)
        return there, Work(
            block_m, self._num_programs, pieces, there[:1], there[4:tiles].view(-1, 4), partials
        )


class TritonAttention:
    """An `AttentionBackend`. One object is used by one thread at a time, on the current stream."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._is_interpreted = isinstance(kernels.attend, InterpretedFunction)
        self._num_sms = INTERPRETED_PROGRAMS
        if not self._is_interpreted:
            self._num_sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        self._partials = GrowingBuffer(torch.float32, self.device)
        self._decode_steps: dict[tuple[Geometry, int], DecodeSteps] = {}
        """By geometry and index of the first layer, which identifies the KV group."""

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
                found[geometry] = Step(
                    batch, self._works(geometry, layer.index, batch, query_lens, seq_lens)
                )
        return found

    def _works(
        self, of: Geometry, index: int, batch: AttentionBatch, query_lens: I64, seq_lens: I64
    ) -> list[Work]:
        block_m, programs = short_rows(of.group), self._num_sms * SHORT_PROGRAMS
        rows, tokens = np.arange(batch.num_seqs), block_m // of.group
        if not batch.num_seqs:
            return []
        if batch.num_tokens == batch.num_seqs:
            tiles = cut_queries(rows, query_lens, seq_lens, tokens, of.window)
            pieces, merged, _ = split(tiles, programs, of.num_kv_heads, UNIT)
            key = (of, index)
            if key not in self._decode_steps:
                self._decode_steps[key] = DecodeSteps(of, programs, self._partials, self.device)
            return [self._decode_steps[key].write(batch.num_seqs, pieces, merged)]
        short, works = is_short(query_lens, tokens), []
        if short.any():
            tiles = cut_queries(rows[short], query_lens, seq_lens, tokens, of.window)
            pieces, merged, num_partials = split(tiles, programs, of.num_kv_heads, UNIT)
            work = self._once(block_m, programs, pieces)
            if num_partials:
                work.tiles, work.partials = (
                    self._copied(merged),
                    self._once_partials(num_partials, of, block_m),
                )
            works.append(work)
        if not short.all():
            block_m = long_rows(of.group, of.head_size)
            tiles = cut_queries(rows[~short], query_lens, seq_lens, block_m // of.group, of.window)
            works.append(self._once(block_m, self._num_sms * LONG_PROGRAMS, whole(tiles)))
        return works

    def _once(self, block_m: int, programs: int, pieces: I32) -> Work:
        return Work(
            block_m, programs, self._copied(pieces), self._copied(np.array([len(pieces)], np.int32))
        )

    def _once_partials(self, count: int, of: Geometry, block_m: int) -> Partials:
        """Return partial results for a step that is not captured: in the shared buffer if it is
        large enough, and in a temporary buffer otherwise."""
        needed = Partials.numbers(count, of, block_m)
        is_shared = needed <= self._partials.capacity
        buffer = self._partials.of(needed) if is_shared else torch.empty(needed, device=self.device)
        return Partials.within(buffer, count, of, block_m)

    def _copied(self, numbers: I32) -> Tensor:
        return _staged(numbers, self.device).to(self.device, non_blocking=True)

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
        step = plan[Geometry.of(layer)]
        check(layer, step.batch, q, k, v, cache, out)
        self._write(layer, k, v, cache, step.batch)
        for work in step.works:
            self._attend(layer, q, cache, step.batch, work, out)

    def _write(
        self, layer: AttentionLayer, k: Tensor, v: Tensor, cache: Cache, batch: AttentionBatch
    ) -> None:
        keys, values = cache
        if not batch.num_tokens:
            return
        kernels.write_kv[(batch.num_tokens,)](
            k,
            v,
            keys,
            values,
            batch.slot_mapping,
            layer.kv_scales,
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            keys.stride(0),
            keys.stride(1),
            BLOCK_SIZE=keys.shape[2],
            HEADS=layer.num_kv_heads,
            D=layer.head_size,
            WIDTH=power_of_two(layer.num_kv_heads * layer.head_size),
            KIND=KINDS.get(keys.dtype, "float"),
            HAS_SCALES=layer.kv_scales is not None,
            INTERPRETED=self._is_interpreted,
            num_warps=4,
        )

    def _attend(
        self,
        layer: AttentionLayer,
        q: Tensor,
        cache: Cache,
        batch: AttentionBatch,
        work: Work,
        out: Tensor,
    ) -> None:
        keys, values = cache
        table, partials = batch.block_table, work.partials
        # Without partial results, the kernel does not write to the placeholders.
        sums, tops, weights = (
            (partials.sums, partials.tops, partials.weights) if partials else (out, out, out)
        )
        compute = q.dtype if keys.dtype == q.dtype or keys.dtype in KINDS else torch.float32
        how = launch(work.block_m, layer.head_size, compute.itemsize, keys.element_size())
        group, block_d = layer.num_heads // layer.num_kv_heads, power_of_two(layer.head_size)
        shape = {
            "KV_HEADS": layer.num_kv_heads,
            "GROUP": group,
            "D": layer.head_size,
            "BLOCK_D": block_d,
            "BLOCK_M": work.block_m,
            "HAS_SINKS": layer.sinks is not None,
            "HAS_SCALES": layer.kv_scales is not None,
            "INTERPRETED": self._is_interpreted,
        }
        kernels.attend[(work.num_programs,)](
            q,
            out,
            keys,
            values,
            table,
            batch.query_start,
            batch.seq_lens,
            layer.sinks,
            layer.kv_scales,
            work.pieces,
            work.num_pieces,
            sums,
            tops,
            weights,
            layer.scale,
            layer.logit_soft_cap or 0.0,
            layer.window or 0,
            q.stride(0),
            q.stride(1),
            out.stride(0),
            out.stride(1),
            keys.stride(0),
            keys.stride(1),
            table.stride(0),
            BLOCK_SIZE=keys.shape[2],
            BLOCK_N=how.block_n,
            HAS_CAP=layer.logit_soft_cap is not None,
            HAS_WINDOW=layer.window is not None,
            COMPUTE=TYPES[compute],
            **shape,
            num_warps=how.num_warps,
            num_stages=how.num_stages,
        )
        if partials is not None and work.tiles is not None:
            kernels.merge[(len(work.tiles), layer.num_kv_heads)](
                out,
                batch.query_start,
                layer.sinks,
                layer.kv_scales,
                work.tiles,
                sums,
                tops,
                weights,
                out.stride(0),
                out.stride(1),
                **shape,
                num_warps=4,
            )

    def export_kv(
        self, cache: Cache, block_ids: list[int], out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        return export_kv(cache, block_ids, out)

    def import_kv(self, cache: Cache, block_ids: list[int], keys: Tensor, values: Tensor) -> None:
        import_kv(cache, block_ids, keys, values)


def _staged(numbers: I32, device: torch.device) -> Tensor:
    """Return the numbers as a tensor from which a copy to the device is asynchronous. PyTorch does
    not reuse pinned memory while a copy reads it."""
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory() if device.type == "cuda" else tensor
