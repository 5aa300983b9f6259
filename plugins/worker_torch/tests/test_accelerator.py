"""How `Cuda` captures, shown by calls of torch.cuda that are recorded: there is no GPU."""

from __future__ import annotations

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch

from dovetail_worker_torch.accelerator import Cuda

DEVICE = torch.device("cuda:1")


class Stream:
    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device

    def wait_stream(self, other: Stream) -> None:
        pass


class FakeGraph:
    """`torch.cuda.CUDAGraph`."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Streams that were entered, and (stream, pool) of each capture."""
    seen, pools, main = SimpleNamespace(entered=[], captures=[]), itertools.count(), Stream()

    def stream(entered: Stream) -> contextlib.AbstractContextManager[None]:
        seen.entered.append(entered)
        return contextlib.nullcontext()

    def graph(
        _: FakeGraph, *, pool: int, stream: Stream
    ) -> contextlib.AbstractContextManager[None]:
        seen.captures.append((stream, pool))
        return contextlib.nullcontext()

    fakes = {
        "Stream": Stream,
        "stream": stream,
        "graph": graph,
        "CUDAGraph": FakeGraph,
        "current_stream": lambda device: main,
        "graph_pool_handle": lambda: next(pools),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return seen


def test_warm_up_and_capture_are_on_one_stream_of_each_accelerator(calls: SimpleNamespace) -> None:
    one, other = Cuda(DEVICE), Cuda(DEVICE)
    ran: list[str] = []
    graphs = [one.capture(lambda: ran.append("one")) for _ in range(3)]
    graphs.append(other.capture(lambda: ran.append("other")))
    assert ran == ["one"] * 6 + ["other"] * 2
    streams = [stream for stream, _ in calls.captures]
    assert calls.entered == streams
    assert streams[0] is streams[1] is streams[2] is not streams[3]
    assert all(stream.device == DEVICE for stream in streams)
    pools = [pool for _, pool in calls.captures]
    assert pools[0] == pools[1] == pools[2] != pools[3]


def test_the_pool_ends_with_its_last_graph_and_the_stream_stays(calls: SimpleNamespace) -> None:
    device = Cuda(DEVICE)
    first = device.capture(lambda: None)
    second = device.capture(lambda: None)
    del first
    third = device.capture(lambda: None)
    del second, third
    device.capture(lambda: None)
    assert [pool for _, pool in calls.captures] == [0, 0, 0, 1]
    assert len({id(stream) for stream, _ in calls.captures}) == 1
