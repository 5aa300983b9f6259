"""What is left for the KV cache of a GPU, and what is said where nothing is; what a container
leaves of a CPU."""

from __future__ import annotations

import pytest
import torch

from dovetail.errors import OutOfMemory
from dovetail_worker_torch.runner.gpu_memory import GpuMemory, largest_step
from dovetail_worker_torch.runner.memory import cpu_memory
from dovetail_worker_torch.runner.threads import set_num_threads

GIB = 2**30


def test_what_is_left():
    assert (
        GpuMemory(80 * GIB, 20 * GIB, 2 * GIB, GIB, 3 * GIB).for_cache(0.9, 2048, 256)
        == (72 - 26) * GIB
    )


@pytest.mark.parametrize(
    ("taken", "hint"),
    [(70, "raise kv_cache.memory_fraction above 0.91"), (79, "To make room, lower")],
)
def test_nothing_is_left(taken, hint):
    with pytest.raises(OutOfMemory) as e:
        GpuMemory(80 * GIB, taken * GIB, 2 * GIB, GIB // 2, GIB // 2).for_cache(0.9, 2048, 256)
    for words in (
        "80.00 GiB",
        f"{taken}.00 GiB are taken",
        "2048 tokens",
        "2.00 GiB",
        "tables of sequences 0.50 GiB",
        hint,
    ):
        assert words in str(e.value)


def test_a_step_that_does_not_fit():
    class Full:
        device = torch.device("cpu")

        def peak_memory(self, run):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(
        OutOfMemory,
        match="a step of 2048 tokens and 256 sequences does not fit on cpu beside the weights",
    ):
        largest_step(None, None, Full(), 2048, 256)


@pytest.mark.parametrize(
    ("available", "taken"), [(100 * GIB, 4 * GIB), (GIB, GIB // 2), (None, 2 * GIB)]
)
def test_the_cache_on_a_cpu(available, taken, monkeypatch):
    monkeypatch.setattr("dovetail_worker_torch.runner.memory.available_memory", lambda: available)
    assert cpu_memory(0.5) == taken


@pytest.mark.parametrize(
    ("asked", "granted", "by_user", "threads"),
    [(None, 8, {}, 3), (None, 2, {}, 2), (4, 2, {}, 4), (None, 2, {"OMP_NUM_THREADS": "3"}, 3)],
)
def test_threads_of_a_step(asked, granted, by_user, threads, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in by_user.items():
        monkeypatch.setenv(name, value)
    set_num_threads(asked, granted)
    assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
