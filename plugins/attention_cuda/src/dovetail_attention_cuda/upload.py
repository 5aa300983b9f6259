"""Numbers that the host makes anew each step, in a place of the device that stays."""

from __future__ import annotations

import torch

from dovetail_attention_cuda.schedule import I32

NUM_STAGED = 3
"""Pinned copies: a step in flight, the one that is planned, and one to spare."""


class Upload:
    """An i32 buffer of the device, and pinned memory from which it is written without waiting for the device."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.on_device = torch.zeros(size, dtype=torch.int32, device=device)
        self._is_cuda = device.type == "cuda"
        self._staged = [torch.empty(size, dtype=torch.int32, pin_memory=True) for _ in range(NUM_STAGED * self._is_cuda)]
        self._copied = [torch.cuda.Event() for _ in self._staged]  # type: ignore[no-untyped-call]
        self._next = 0

    def __call__(self, numbers: I32) -> None:
        """Write the buffer's first numbers, in the order of the current stream."""
        given = torch.from_numpy(numbers)
        if not self._is_cuda:
            self.on_device[: len(given)] = given
            return
        staged, copied = self._staged[self._next], self._copied[self._next]
        self._next = (self._next + 1) % NUM_STAGED
        copied.synchronize()  # of three steps ago: no wait
        staged[: len(given)] = given
        self.on_device[: len(given)].copy_(staged[: len(given)], non_blocking=True)
        copied.record()
