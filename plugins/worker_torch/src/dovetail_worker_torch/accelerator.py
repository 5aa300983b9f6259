"""What steps ask of a device that runs behind the host: numbers that come and go without waiting, and captured launches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy.typing as npt
import torch
from torch import Tensor


class Fetched(Protocol):
    """A tensor on its way to the host."""

    def wait(self) -> Tensor:
        """The tensor in host memory, as it was when it was fetched."""


class Graph(Protocol):
    """Captured launches."""

    def replay(self) -> None:
        """Queue them again: the same operations on the same addresses."""


class Accelerator(Protocol):
    """All that is queued is done in order, on one stream."""

    device: torch.device

    def current(self) -> AbstractContextManager[Any]:
        """Within it, this device is the one that launches go to."""

    def upload(self, numbers: npt.NDArray[Any]) -> Tensor:
        """A copy on the device. The array may be changed at once."""

    def fetch(self, tensor: Tensor) -> Fetched:
        """Begin to copy a tensor of the device to the host."""

    def capture(self, run: Callable[[], None]) -> Graph:
        """Run once, then capture. What `run` allocates lives as long as the graph, in memory that all graphs share: one graph's
        results are good until the next replay of any. Raises `torch.OutOfMemoryError`, and what `run` raises."""

    def synchronize(self) -> None:
        """Wait for all that is queued."""


def put(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor of host values, without waiting for the device."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Cuda:
    """An NVIDIA GPU. PyTorch keeps pinned memory that a copy still reads from being given to the next."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None

    def current(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device)

    def upload(self, numbers: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(numbers).pin_memory().to(self.device, non_blocking=True)

    def fetch(self, tensor: Tensor) -> Fetched:
        return CudaFetched(tensor)

    def capture(self, run: Callable[[], None]) -> Graph:
        side: Any = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        main = torch.cuda.current_stream(self.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):  # kernels are built, and workspaces made, outside of the capture
            run()
        main.wait_stream(side)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        return graph

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


class CudaFetched:
    """Pinned memory, and the event after which it holds the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._done.record()

    def wait(self) -> Tensor:
        self._done.synchronize()
        return self._host
