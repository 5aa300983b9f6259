"""What is left for the KV cache of a GPU, and what is said where nothing is."""

from __future__ import annotations

import pytest
import torch

from dovetail.errors import OutOfMemory
from dovetail_worker_torch.gpu_memory import GpuMemory, largest_step

GIB = 2**30


def test_what_is_left():
    assert GpuMemory(80 * GIB, 20 * GIB, 2 * GIB, GIB, 3 * GIB).for_cache(0.9, 2048, 256) == (72 - 26) * GIB


@pytest.mark.parametrize(("taken", "hint"), [(70, "raise kv_cache.memory_fraction above 0.91"), (79, "To make room, lower")])
def test_nothing_is_left(taken, hint):
    with pytest.raises(OutOfMemory) as e:
        GpuMemory(80 * GIB, taken * GIB, 2 * GIB, GIB // 2, GIB // 2).for_cache(0.9, 2048, 256)
    for words in ("80.00 GiB", f"{taken}.00 GiB are taken", "2048 tokens", "2.00 GiB", "tables of sequences 0.50 GiB", hint):
        assert words in str(e.value)


def test_a_step_that_does_not_fit():
    class Full:
        device = torch.device("cpu")

        def peak_memory(self, run):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemory, match="a step of 2048 tokens and 256 sequences does not fit on cpu beside the weights"):
        largest_step(None, None, Full(), 2048, 256)
