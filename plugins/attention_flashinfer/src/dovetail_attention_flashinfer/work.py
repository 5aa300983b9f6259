"""A step's work for layers of one geometry: FlashInfer's wrappers, and what they plan with and
read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dovetail.errors import PluginError
from dovetail.interfaces.attention import AttentionBatch, AttentionLayer
from dovetail_attention_flashinfer.pages import Pages, PageTable, find_pages, to_host

LAYOUT = "NHD"
WORKSPACE_IS_FULL = "Increase the workspace buffer size"
"""FlashInfer's words."""
DECODE_INTEGERS = 1 << 20
"""Bytes of a decode wrapper's plan: FlashInfer takes 8 MiB for each, and a thousand rows fill 50
KiB."""


TENSOR_CORE_GROUP = 4
"""Query heads that share a KV head, from which decode runs on tensor cores, by the prefill's
kernels. The other kernels have groups of 1, 2, 3, 4 and 8 only."""


@dataclass(frozen=True)
class Geometry:
    """What is fixed when FlashInfer plans."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    window: int | None
    logit_soft_cap: float | None

    @staticmethod
    def of(layer: AttentionLayer) -> Geometry:
        return Geometry(
            layer.num_heads,
            layer.num_kv_heads,
            layer.head_size,
            layer.scale,
            layer.window,
            layer.logit_soft_cap,
        )

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def uses_tensor_cores(self) -> bool:
        """In decode."""
        return self.group >= TENSOR_CORE_GROUP

    def page_size(self, block_size: int) -> int:
        return block_size if self.window is None else 1


@dataclass(frozen=True)
class Types:
    """Of a run."""

    q: torch.dtype
    kv: torch.dtype

    @staticmethod
    def of(q: Tensor, keys: Tensor) -> Types:
        """FlashInfer multiplies types of 16 bits with themselves, and FP8 with either."""
        return Types(q.dtype if keys.dtype.itemsize == 1 else keys.dtype, keys.dtype)


class Work:
    """Prepared once a step, from the host's numbers; gathered by the first layer, from the batch's
    buffers; run by each layer.

    FlashInfer's plan needs types, which come with a run: a step is planned with those of the run
    before, if there was one, and once more if they were others.
    """

    def __init__(
        self, flashinfer: Any, workspace: Tensor, geometry: Geometry, block_size: int
    ) -> None:
        self._flashinfer, self._workspace, self._geometry, self._block_size = (
            flashinfer,
            workspace,
            geometry,
            block_size,
        )
        self.device, self.page_size = workspace.device, geometry.page_size(block_size)
        self._wrappers: dict[Types, Any] = {}
        self._types: Types | None = None
        """Of the run before."""
        self._is_planned = self.is_gathered = False
        self.is_captured = False
        """A graph reads this work's buffers, which then have to stay."""
        is_cuda = self.device.type == "cuda"
        self._copied = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]
        self._pages: Pages
        self._table: PageTable
        self.slots: Tensor
        """i32[T]: where new keys and values go."""
        self.nobody: Tensor
        """i32[T] of zeros."""

    def prepare(self, batch: AttentionBatch, types: Types | None) -> None:
        """`types`: what to take for those of the run before, if there was none."""
        self._pages = find_pages(batch, self.page_size, self._geometry.window)
        self._room(batch)
        self._table.prepare(self._pages, batch.block_table)
        self._types, self._is_planned, self.is_gathered = self._types or types, False, False
        if self._types is not None:
            self._plan(self._types)

    def gather(self, batch: AttentionBatch) -> None:
        self._table.gather(batch.block_table[: batch.num_seqs])
        self.slots.copy_(batch.slot_mapping[: batch.num_tokens])
        self.is_gathered = True

    def close(self) -> None:
        """Wait until nothing is copied from the wrappers' pinned memory, which PyTorch does not
        know of."""
        if self._copied is not None:
            self._copied.synchronize()

    def wrapper(self, types: Types) -> Any:
        """The one to run, planned."""
        if not self._is_planned or self._types != types:
            self._plan(types)
        return self._wrappers[types]

    def _plan(self, types: Types) -> None:
        if types not in self._wrappers:
            self._wrappers[types] = self._new_wrapper()
        if self._copied is not None:
            # of the step before: FlashInfer writes pinned memory that it is copied from
            self._copied.synchronize()
        indptr, last_len = (
            to_host(x, self.device) for x in (self._pages.indptr, self._pages.last_len)
        )
        of = self._geometry
        try:
            self._wrappers[types].plan(
                **self._sequences(indptr, self._table.indices[: self._pages.count], last_len),
                num_qo_heads=of.num_heads,
                num_kv_heads=of.num_kv_heads,
                page_size=self.page_size,
                window_left=-1 if of.window is None else of.window - 1,
                logits_soft_cap=of.logit_soft_cap,
                sm_scale=of.scale,
                q_data_type=types.q,
                kv_data_type=types.kv,
            )
        except Exception as e:
            if WORKSPACE_IS_FULL not in str(e):
                raise
            size = f"{self._workspace.nbytes >> 20} MiB"
            step = (
                f"a step of {len(self._pages.last_len)} rows and {of.num_heads} heads of"
                f" {of.head_size}"
            )
            raise PluginError(
                f"FlashInfer has not enough workspace ({size}) for {step}: raise attention's"
                " workspace_mb"
            ) from e
        if self._copied is not None:
            self._copied.record()
        self._types, self._is_planned = types, True

    def _room(self, batch: AttentionBatch) -> None:
        """Make what the step's numbers are written to."""
        raise NotImplementedError

    def _new_wrapper(self) -> Any:
        raise NotImplementedError

    def _sequences(self, indptr: Tensor, indices: Tensor, last_len: Tensor) -> dict[str, Any]:
        """Arguments of `plan` that its wrapper has under names of its own."""
        raise NotImplementedError

    def _make_room(self, num_pages: int, num_tokens: int) -> None:
        self._table = PageTable(num_pages, self._block_size // self.page_size, self.device)
        self.slots, self.nobody = (
            torch.zeros(num_tokens, dtype=torch.int32, device=self.device) for _ in range(2)
        )


class RaggedWork(Work):
    """For steps with prefill, whose decode rows are rows of one query."""

    def __init__(
        self, flashinfer: Any, workspace: Tensor, geometry: Geometry, block_size: int, backend: str
    ) -> None:
        super().__init__(flashinfer, workspace, geometry, block_size)
        self._backend = backend

    def _room(self, batch: AttentionBatch) -> None:
        self._make_room(self._pages.count, batch.num_tokens)

    def _new_wrapper(self) -> Any:
        return self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            self._workspace, LAYOUT, backend=self._backend
        )

    def _sequences(self, indptr: Tensor, indices: Tensor, last_len: Tensor) -> dict[str, Any]:
        return {
            "qo_indptr": to_host(self._pages.query_start, self.device),
            "paged_kv_indptr": indptr,
            "paged_kv_indices": indices,
            "paged_kv_last_page_len": last_len,
            "head_dim_qk": self._geometry.head_size,
            "causal": True,
        }


def rounded_width(num_blocks: int) -> int:
    """Columns of a block table, rounded up by at most an eighth: the tables of eager steps grow
    with every block, and all those of one rounded width share a work."""
    step = max(1, 1 << (num_blocks - 1).bit_length() >> 3)
    return -(-num_blocks // step) * step


class DecodeWork(Work):
    """For steps of so many rows of one token each: everything lies in buffers that stay where they
    are."""

    def __init__(
        self,
        flashinfer: Any,
        workspace: Tensor,
        geometry: Geometry,
        block_size: int,
        num_rows: int,
        num_blocks: int,
    ) -> None:
        """For rows of so many blocks at most."""
        super().__init__(flashinfer, workspace, geometry, block_size)
        most = num_blocks * block_size // self.page_size
        self._make_room(
            num_rows * (most if geometry.window is None else min(most, geometry.window)), num_rows
        )
        self._indptr = torch.zeros(num_rows + 1, dtype=torch.int32, device=self.device)
        self._last_len = torch.ones(num_rows, dtype=torch.int32, device=self.device)

    def _room(self, batch: AttentionBatch) -> None:
        """It is there."""

    def _new_wrapper(self) -> Any:
        wrapper = self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            LAYOUT,
            use_cuda_graph=True,
            use_tensor_cores=self._geometry.uses_tensor_cores,
            paged_kv_indptr_buffer=self._indptr,
            paged_kv_indices_buffer=self._table.indices,
            paged_kv_last_page_len_buffer=self._last_len,
            backend="fa2",
        )
        wrapper.reset_workspace_buffer(
            self._workspace, torch.zeros(DECODE_INTEGERS, dtype=torch.uint8, device=self.device)
        )
        return wrapper

    def _sequences(self, indptr: Tensor, indices: Tensor, last_len: Tensor) -> dict[str, Any]:
        names = {"indptr": indptr, "indices": indices, "last_page_len": last_len}
        return {**names, "head_dim": self._geometry.head_size}
