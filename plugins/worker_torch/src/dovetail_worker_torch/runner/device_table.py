"""The sequence table with a copy on the device, so that a step's inputs need not wait for the host
to learn the last tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dovetail.types import KVGroup, StepPlan
from dovetail_worker_torch.accelerator import Accelerator
from dovetail_worker_torch.runner.batch import I64, SequenceTable, StepInputs


class DeviceTable(SequenceTable):
    """On the device: every batch row's tokens, sampled ones included as soon as they are sampled,
    and its blocks.

    There is one batch row more than on the host, of padding: one token, in block 0.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        max_num_seqs: int,
        max_len: int,
        groups: list[KVGroup],
        draft_group: KVGroup | None = None,
    ) -> None:
        super().__init__(max_num_seqs, max_len, groups, draft_group)
        self._accelerator = accelerator
        self.padding_batch_index = max_num_seqs

        def zeros(width: int) -> Tensor:
            return torch.zeros(
                max_num_seqs + 1, width, dtype=torch.int32, device=accelerator.device
            )

        self.tokens_on_device = zeros(max_len + 1)
        self.blocks_on_device = [
            zeros(table.shape[1]) for table in self._block_table[: len(groups)]
        ]
        """Per KV group of the model."""
        targets = [self.tokens_on_device, *self.blocks_on_device]
        self._changes: list[tuple[list[npt.NDArray[Any]], list[npt.NDArray[Any]]]] = [
            ([], []) for _ in targets
        ]
        """Places in the flat tensors, and what they are to hold; not on the device yet."""
        self._targets = targets

    def update(self, plan: StepPlan) -> None:
        super().update(plan)
        for start in plan.starts:
            self._write(0, self.batch_index_of[start.seq_id], 0, start.token_ids)
        self._flush()

    def write_drafts(self, batch_index: int, start: int, token_ids: list[int]) -> None:
        super().write_drafts(batch_index, start, token_ids)
        self._write(0, batch_index, start, token_ids)

    def _flush(self) -> None:
        for target, (places, values) in zip(self._targets, self._changes, strict=True):
            if places:
                self._scatter(target, np.concatenate(places), np.concatenate(values))
                places.clear()
                values.clear()

    def _append(self, group: int, batch_index: int, blocks: list[int]) -> None:
        if group < len(self.blocks_on_device):
            self._write(1 + group, batch_index, int(self._num_blocks[group][batch_index]), blocks)
        super()._append(group, batch_index, blocks)

    def _write(self, target: int, batch_index: int, start: int, values: list[int]) -> None:
        if values:
            places, written = self._changes[target]
            begin = batch_index * self._targets[target].shape[1] + start
            places.append(np.arange(begin, begin + len(values)))
            written.append(np.array(values, np.int32))

    def _scatter(self, target: Tensor, places: I64, values: npt.NDArray[np.int32]) -> None:
        # One copy to the device: values behind places.
        packed = self._accelerator.upload(np.concatenate([places.view(np.int32), values]))
        at = packed[: 2 * len(places)].view(torch.int64)
        target.view(-1).index_put_((at,), packed[2 * len(places) :])

    def device_tokens_at(self, inputs: StepInputs) -> Tensor:
        """`tokens_at`, on the device and from there."""
        self._flush()
        places = self._accelerator.upload(
            self._places(inputs.batch_index_of_token, inputs.positions)
        )
        return self.tokens_on_device.view(-1)[places].to(torch.int64)

    def _places(self, batch_indices: I64, positions: npt.NDArray[np.integer[Any]]) -> I64:
        """Of tokens, in `tokens_on_device` seen as one row."""
        return (batch_indices * self.tokens_on_device.shape[1] + positions).astype(np.int64)

    def append(
        self, batch_indices: I64, lengths: npt.NDArray[np.integer[Any]], token_ids: list[int]
    ) -> None:
        """Tokens that the host sampled, or was told of, on both sides."""
        super().append(batch_indices, lengths, token_ids)
        if token_ids:
            self._flush()
            self._scatter(
                self.tokens_on_device,
                self._places(batch_indices, lengths),
                np.array(token_ids, np.int32),
            )

    def append_on_device(
        self, batch_indices: I64, lengths: npt.NDArray[np.integer[Any]], token_ids: Tensor
    ) -> None:
        """The tokens sampled for these batch rows, which the host does not know yet: `finalized`
        tells it. `token_ids` i64[R]."""
        places = self._accelerator.upload(self._places(batch_indices, lengths))
        self.tokens_on_device.view(-1).index_put_((places,), token_ids.to(torch.int32))

    def finalized(
        self, batch_indices: I64, lengths: npt.NDArray[np.integer[Any]], token_ids: list[int]
    ) -> None:
        """Tell the host what `append_on_device` added."""
        super().append(batch_indices, lengths, token_ids)
