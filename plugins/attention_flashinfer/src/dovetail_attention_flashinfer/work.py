"""Manage the work of a step for layers of one geometry: FlashInfer's wrappers, the numbers with
which they plan, and the buffers that they read."""

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
"""Part of FlashInfer's error message."""
DECODE_INTEGERS = 1 << 20
"""Bytes for the plan of a decode wrapper. FlashInfer's default is 8 MiB each, and a thousand rows
use 50 KiB."""


TENSOR_CORE_GROUP = 4
"""Minimum number of query heads per KV head for decode on tensor cores, which uses the prefill
kernels. The other kernels support groups of 1, 2, 3, 4 and 8 only."""


@dataclass(frozen=True)
class Geometry:
    """The properties of layers that are fixed by a FlashInfer plan."""

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
        """Whether decode uses tensor cores."""
        return self.group >= TENSOR_CORE_GROUP

    def page_size(self, block_size: int) -> int:
        return block_size if self.window is None else 1


@dataclass(frozen=True)
class Types:
    """The dtypes of a run."""

    q: torch.dtype
    kv: torch.dtype

    @staticmethod
    def of(q: Tensor, keys: Tensor) -> Types:
        """Return the dtypes for FlashInfer, which supports 16-bit KV with q of the same dtype, and
        FP8 KV with either 16-bit dtype."""
        return Types(q.dtype if keys.dtype.itemsize == 1 else keys.dtype, keys.dtype)


class Work:
    """The work of a step: prepared once from the numbers on the host, gathered by the first layer
    from the buffers of the batch, and run by each layer.

    FlashInfer needs dtypes to plan, but they are known in a run only. A step is planned with those
    of the previous run, if any, and planned again if the dtypes differ.
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
        """Dtypes of the previous run."""
        self._is_planned = self.is_gathered = False
        self.is_captured = False
        """Whether a graph reads the buffers of this work, so that they must not be freed."""
        is_cuda = self.device.type == "cuda"
        self._copied = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]
        self._pages: Pages
        self._table: PageTable
        self.slots: Tensor
        """i32[T]: slots to which new keys and values are written."""
        self.zero_rows: Tensor
        """i32[T] of zeros: the row of each token when the whole cache is one sequence."""

    def prepare(self, batch: AttentionBatch, types: Types | None) -> None:
        """Prepare a step. `types` are the assumed dtypes if this work has not run before."""
        self._pages = find_pages(batch, self.page_size, self._geometry.window)
        self._ensure_buffers(batch)
        self._table.prepare(self._pages, batch.block_table)
        self._types, self._is_planned, self.is_gathered = self._types or types, False, False
        if self._types is not None:
            self._plan(self._types)

    def gather(self, batch: AttentionBatch) -> None:
        self._table.gather(batch.block_table[: batch.num_seqs])
        self.slots.copy_(batch.slot_mapping[: batch.num_tokens])
        self.is_gathered = True

    def close(self) -> None:
        """Wait for copies from the wrappers' pinned memory, which PyTorch does not track."""
        if self._copied is not None:
            self._copied.synchronize()

    def wrapper(self, types: Types) -> Any:
        """Return the wrapper for these dtypes, planned for the step."""
        if not self._is_planned or self._types != types:
            self._plan(types)
        return self._wrappers[types]

    def _plan(self, types: Types) -> None:
        if types not in self._wrappers:
            self._wrappers[types] = self._new_wrapper()
        if self._copied is not None:
            # Wait for the copies of the previous step, because FlashInfer overwrites the pinned
            # memory.
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
                f"FlashInfer: not enough workspace ({size}) for {step}: raise attention's"
                " workspace_mb"
            ) from e
        if self._copied is not None:
            self._copied.record()
        self._types, self._is_planned = types, True

    def _ensure_buffers(self, batch: AttentionBatch) -> None:
        """Ensure that the buffers for the numbers of the step exist."""
        raise NotImplementedError

    def _new_wrapper(self) -> Any:
        raise NotImplementedError

    def _sequences(self, indptr: Tensor, indices: Tensor, last_len: Tensor) -> dict[str, Any]:
        """Return the arguments of `plan` whose names differ between the wrappers."""
        raise NotImplementedError

    def _allocate_buffers(self, num_pages: int, num_tokens: int) -> None:
        self._table = PageTable(num_pages, self._block_size // self.page_size, self.device)
        self.slots, self.zero_rows = (
            torch.zeros(num_tokens, dtype=torch.int32, device=self.device) for _ in range(2)
        )


class RaggedWork(Work):
    """The work of steps with prefill. Their decode rows have one query."""

    def __init__(
        self, flashinfer: Any, workspace: Tensor, geometry: Geometry, block_size: int, backend: str
    ) -> None:
        super().__init__(flashinfer, workspace, geometry, block_size)
        self._backend = backend

    def _ensure_buffers(self, batch: AttentionBatch) -> None:
        self._allocate_buffers(self._pages.count, batch.num_tokens)

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
    """Return the number of columns of a block table, rounded up by at most an eighth. The tables of
    eager steps grow with every block, and tables of the same rounded width share a `DecodeWork`."""
    step = max(1, 1 << (num_blocks - 1).bit_length() >> 3)
    return -(-num_blocks // step) * step


class DecodeWork(Work):
    """The work of steps with a fixed number of rows of one token each, in buffers with stable
    addresses."""

    def __init__(
        self,
        flashinfer: Any,
        workspace: Tensor,
        geometry: Geometry,
        block_size: int,
        num_rows: int,
        num_blocks: int,
    ) -> None:
        """Create the buffers for rows of at most `num_blocks` blocks."""
        super().__init__(flashinfer, workspace, geometry, block_size)
        most = num_blocks * block_size // self.page_size
        self._allocate_buffers(
            num_rows * (most if geometry.window is None else min(most, geometry.window)), num_rows
        )
        self._indptr = torch.zeros(num_rows + 1, dtype=torch.int32, device=self.device)
        self._last_len = torch.ones(num_rows, dtype=torch.int32, device=self.device)

    def _ensure_buffers(self, batch: AttentionBatch) -> None:
        """The buffers were allocated by the constructor."""

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
