"""Compute the pages of the cache that the rows of a step attend to: the numbers for FlashInfer's
plan on the host, and the page table on the device.

A page is a block. For layers with a window, a page is a single token, so that a row begins at its
window and no slot before the window is read.
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
    """The pages of a step's rows, on the host. The pages of a row are consecutive and contain all
    tokens that any of its queries attends to."""

    query_start: I64
    """[B + 1]"""
    first: I64
    """[B]: the first of these pages, counted from the beginning of the sequence."""
    indptr: I64
    """[B + 1]: row b has the pages `indptr[b] … indptr[b + 1] - 1` of the step."""
    last_len: I64
    """[B]: number of tokens in the last page."""

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
    """The page numbers of a step as one array, i32 `indices`, which FlashInfer reads.

    `prepare` uses the numbers on the host only, and computes the position of each page in the block
    table. `gather` reads the table, which operations captured with it may have written.
    """

    def __init__(self, capacity: int, pages_per_block: int, device: torch.device) -> None:
        self.indices = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._per_block = pages_per_block
        self._places = torch.zeros(capacity, dtype=torch.int32, device=device)
        """Positions in the flattened block table."""
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
        self._places[count:] = 0  # positions of an earlier step may be beyond this table
        if self._per_block > 1:
            self._within[:count] = page % self._per_block

    def gather(self, table: Tensor) -> None:
        """Gather the page numbers at all positions, so that a captured gather fits every step. The
        positions after those of the step are 0, and their page numbers are not used."""
        flat = table.as_strided(((len(table) - 1) * table.stride(0) + table.shape[1],), (1,))
        torch.index_select(flat, 0, self._places, out=self.indices)
        if self._per_block > 1:
            self.indices.mul_(self._per_block).add_(self._within)


def to_host(numbers: I64, device: torch.device) -> Tensor:
    """Return an i32 tensor on the host, which FlashInfer reads and copies to the device. PyTorch
    does not reuse pinned memory during a copy."""
    tensor = torch.from_numpy(numbers.astype(np.int32))
    return tensor.pin_memory() if device.type == "cuda" else tensor


def to_device(numbers: I64, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
