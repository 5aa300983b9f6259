"""What steps ask of a device that runs behind the host: numbers that come and go without waiting,
and captured launches."""

from __future__ import annotations

import gc
import weakref
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
        """Run once, then capture. All graphs share the memory in which `run` allocates, so a result
        that is to outlive the next capture or replay must be copied to memory allocated outside.
        Raises `torch.OutOfMemoryError`, and what `run` raises."""

    def synchronize(self) -> None:
        """Wait for all that is queued."""

    def memory(self) -> tuple[int, int]:
        """Bytes of the device: free, once PyTorch has returned what it holds unused, and in
        total."""

    def peak_memory(self, run: Callable[[], None]) -> int:
        """Run; return the largest number of bytes allocated meanwhile, beyond those allocated
        before."""


def put(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor of host values, without waiting for the device."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Cuda:
    """An NVIDIA GPU. PyTorch keeps pinned memory that a copy still reads from being given to the
    next.

    All graphs of one object are warmed up and captured on one stream: cuBLAS keeps a workspace of
    32 MiB for each stream that it has worked on. Each object has its own stream and memory pool for
    graphs, so that engines neither share a workspace nor free what another's graphs use. (PyTorch
    repeats its streams after 32.)
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._capture_stream: Any = None
        self._pool: Any = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def current(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device)

    def upload(self, numbers: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(numbers).pin_memory().to(self.device, non_blocking=True)

    def fetch(self, tensor: Tensor) -> Fetched:
        return CudaFetched(tensor)

    def capture(self, run: Callable[[], None]) -> Graph:
        if self._capture_stream is None:
            self._capture_stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream, main = self._capture_stream, torch.cuda.current_stream(self.device)
        stream.wait_stream(main)
        with torch.cuda.stream(
            stream
        ):  # kernels are built, and workspaces allocated, outside of the capture
            run()
        main.wait_stream(stream)
        if (
            not self._graphs
        ):  # PyTorch gives a pool up with its last graph: its handle is not to be used again
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            run()
        self._graphs.add(graph)
        return graph

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def memory(self) -> tuple[int, int]:
        torch.cuda.synchronize(self.device)
        gc.collect()  # tensors in reference cycles
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)

    def peak_memory(self, run: Callable[[], None]) -> int:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        return int(torch.cuda.max_memory_allocated(self.device)) - before


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
