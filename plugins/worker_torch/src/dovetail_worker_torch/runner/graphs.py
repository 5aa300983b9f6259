"""Captured decode steps: one graph for each of the capture sizes, all reading the same buffers.

A step of B rows runs the graph of the next size, its other rows padding: sequences of one token in
block 0. What a graph reads of a step is two numbers a row, its batch row and how many tokens it has
computed; tokens and blocks it gathers from the table's copy on the device.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dovetail.interfaces.architecture import Model
from dovetail.interfaces.attention import AttentionBackend, AttentionBatch, AttentionLayer
from dovetail.types import KVGroup
from dovetail_worker_torch.accelerator import Accelerator, Graph
from dovetail_worker_torch.runner.batch import I64
from dovetail_worker_torch.runner.device_table import DeviceTable
from dovetail_worker_torch.runner.step_attention import StepAttention


def capture_sizes(max_num_seqs: int) -> list[int]:
    """Sizes in which few rows of padding are computed: 1, 2, 4, 8, then steps of 8 to 256, and of
    32 after that."""
    largest = min(max_num_seqs, 512)
    return [n for n in (1, 2, 4, *range(8, 257, 8), *range(288, 512, 32)) if n < largest] + [
        largest
    ]


class GraphLadder:
    """Decode steps of one model. `capture_all` once, when the caches are there; then `run`."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: Model,
        table: DeviceTable,
        groups: list[KVGroup],
        backends: list[AttentionBackend],
        layers: list[list[AttentionLayer]],
        attend: StepAttention,
        sizes: list[int],
    ) -> None:
        """`layers` and `backends` by group; `attend` is the runner's, whose plans it sets."""
        self._accelerator, self._model, self._table, self._attend = (
            accelerator,
            model,
            table,
            attend,
        )
        self._groups, self._backends, self._layers = groups, backends, layers
        self.sizes = sorted(sizes)
        self._graphs: dict[int, Graph] = {}
        largest, device = self.sizes[-1], accelerator.device
        self._numbers = torch.zeros(2, largest, dtype=torch.int64, device=device)
        """Of each row: its batch row, and how many tokens it has computed."""
        self._query_start = torch.arange(largest + 1, dtype=torch.int32, device=device)
        self._seq_lens = torch.ones(largest, dtype=torch.int32, device=device)
        self._block_tables = [
            torch.zeros_like(t[:1].expand(largest, -1)).contiguous() for t in table.blocks_on_device
        ]
        self._slots = [torch.zeros(largest, dtype=torch.int64, device=device) for _ in groups]
        self._logits = torch.zeros(largest, model.vocab_size, dtype=torch.float32, device=device)
        """Of the last step, whatever its size. Tensors allocated in a capture and kept would add up
        over the sizes."""

    def size_for(self, num_rows: int) -> int | None:
        """The captured size that a step of so many rows runs in, if there is one."""
        at = bisect_left(self.sizes, num_rows)
        return (
            self.sizes[at]
            if num_rows > 0 and at < len(self.sizes) and self.sizes[at] in self._graphs
            else None
        )

    def capture_all(self, progress: Callable[[int, int], None]) -> None:
        """Capture every size, the largest first, so that the others fit into its memory."""
        for done, size in enumerate(reversed(self.sizes)):
            progress(done, len(self.sizes))
            self.capture(size)
        progress(len(self.sizes), len(self.sizes))

    def capture(self, size: int) -> None:
        """Capture one of the sizes."""
        nobody = np.zeros(0, np.int64)
        self._prepare(nobody, nobody, size)
        self._graphs[size] = self._accelerator.capture(lambda: self._forward(size))

    def run(self, batch_indices: I64, num_computed: I64, size: int) -> Tensor:
        """Queue a step of one token a row: f32[rows, V], overwritten by the next step."""
        self._prepare(batch_indices, num_computed, size)
        self._graphs[size].replay()
        return self._logits[: len(batch_indices)]

    def _prepare(self, batch_indices: I64, num_computed: I64, size: int) -> None:
        """Write what differs between steps of a size."""
        numbers = np.zeros((2, size), np.int64)
        numbers[0], numbers[0, : len(batch_indices)], numbers[1, : len(batch_indices)] = (
            self._table.padding_batch_index,
            batch_indices,
            num_computed,
        )
        self._numbers[:, :size].copy_(self._accelerator.upload(numbers))
        lens = (numbers[1] + 1).tolist()
        for i, (group, backend, layers) in enumerate(
            zip(self._groups, self._backends, self._layers, strict=True)
        ):
            batch = AttentionBatch(
                self._query_start[: size + 1],
                self._seq_lens[:size],
                self._block_tables[i][:size],
                self._slots[i][:size],
                [*range(size + 1)],
                lens,
                size,
                size,
                1,
                max(lens),
            )
            self._attend.plans[i] = backend.plan(batch, layers, group.block_size)

    def _forward(self, size: int) -> None:
        """What is captured."""
        batch_indices, positions = self._numbers[0, :size], self._numbers[1, :size]
        self._seq_lens[:size] = positions + 1
        for group, own, table, slots in zip(
            self._groups, self._table.blocks_on_device, self._block_tables, self._slots, strict=True
        ):
            torch.index_select(own, 0, batch_indices, out=table[:size])
            column = torch.div(positions, group.block_size, rounding_mode="floor")
            first = own[batch_indices, column].to(torch.int64) * group.block_size
            slots[:size] = first + (positions - column * group.block_size)
        token_ids = self._table.tokens_on_device[batch_indices, positions].to(torch.int64)
        hidden = self._model.forward(token_ids, positions, self._attend)
        self._logits[:size] = self._model.logits(hidden)
