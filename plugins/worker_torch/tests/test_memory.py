"""What is left for the KV cache of a GPU, and what is said where nothing is."""

from __future__ import annotations

import pytest

from dovetail.errors import OutOfMemory
from dovetail_worker_torch.gpu_memory import GpuMemory

GIB = 2**30


def test_what_is_left():
    assert GpuMemory(80 * GIB, 20 * GIB, 2 * GIB, GIB).for_cache(0.9, 2048, 256) == (72 - 23) * GIB


@pytest.mark.parametrize(("taken", "hint"), [(70, "raise kv_cache.memory_fraction above 0.91"), (79, "To make room, lower")])
def test_nothing_is_left(taken, hint):
    with pytest.raises(OutOfMemory) as e:
        GpuMemory(80 * GIB, taken * GIB, 2 * GIB, GIB).for_cache(0.9, 2048, 256)
    for words in ("80.00 GiB", f"{taken}.00 GiB are taken", "2048 tokens", "2.00 GiB", hint):
        assert words in str(e.value)
