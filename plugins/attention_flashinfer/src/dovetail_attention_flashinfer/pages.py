"""Which pages of the cache a step's rows see: what FlashInfer is told on the host, and where it is
found on the device.

A page is a block; for layers with a window it is a single token, so that a row begins where its
window does, and nothing before it is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dovetail.interfaces.attention import AttentionBatch

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pages:
    """Of a step's rows, on the host. A row's pages are consecutive: those that hold what any of its
    queries sees."""

    query_start: I64
    """[B + 1]"""
    first: I64
    """[B]: the first page that is seen, counted from the sequence's begin."""
    indptr: I64
    """[B + 1]: row b has the pages `indptr[b] … indptr[b + 1] - 1` of the step."""
    last_len: I64
    """[B]: tokens in the last page."""

    @property
    def count(self) -> int:
        return int(self.indptr[-1])


def find_pages(batch: AttentionBatch, page_size: int, window: int | None) -> Pages:
    starts = np.array(batch.host_query_start[: batch.num_seqs + 1], np.int64)
    lens = np.array(batch.host_seq_lens[: batch.num_seqs], np.int64)
    computed = lens - (starts[1:] - starts[:-1])
    first = (
        np.zeros_like(lens) if window is None else np.maximum(computed - window + 1, 0) // page_size
    )
    ends = -(-lens // page_size)
    return Pages(
        starts, first, np.concatenate([[0], np.cumsum(ends - first)]), lens - (ends - 1) * page_size
    )


class PageTable:
    """The step's page numbers in one row, as FlashInfer reads them: i32 `indices`, gathered from
    the block table.

    `prepare` needs the host's numbers alone, and says where in the table each page stands; `gather`
    reads the table, which may be written by what is captured with it.
    """

    def __init__(self, capacity: int, pages_per_block: int, device: torch.device) -> None:
        self.indices = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._per_block = pages_per_block
        self._places = torch.zeros(capacity, dtype=torch.int32, device=device)
        """In the table, seen as one row."""
        self._within = torch.zeros(
            capacity if pages_per_block > 1 else 0, dtype=torch.int32, device=device
        )
        """Page within the block."""

    def prepare(self, pages: Pages, table: Tensor) -> None:
        count, device = pages.count, self.indices.device
        numbers = to_device(
            np.stack([pages.indptr[1:] - pages.indptr[:-1], pages.first - pages.indptr[:-1]]),
            device,
        )
        rows = torch.repeat_interleave(numbers[0], output_size=count)
        page = torch.arange(count, device=device) + numbers[1][rows]
        self._places[:count] = rows * table.stride(0) + torch.div(
            page, self._per_block, rounding_mode="floor"
        )
        self._places[count:] = 0  # those of a step before may lie beyond this table
        if self._per_block > 1:
            self._within[:count] = page % self._per_block

    def gather(self, table: Tensor) -> None:
        """All places, so that it does the same work each time; those behind the step's own are 0,
        and nobody reads what they give."""
        flat = table.as_strided(((len(table) - 1) * table.stride(0) + table.shape[1],), (1,))
        torch.index_select(flat, 0, self._places, out=self.indices)
        if self._per_block > 1:
            self.indices.mul_(self._per_block).add_(self._within)


def to_host(numbers: I64, device: torch.device) -> Tensor:
    """An i32 tensor that FlashInfer reads here and copies to the device: PyTorch keeps pinned
    memory until that is done."""
    tensor = torch.from_numpy(numbers.astype(np.int32))
    return tensor.pin_memory() if device.type == "cuda" else tensor


def to_device(numbers: I64, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
