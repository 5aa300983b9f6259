"""Allocate memory for data that kernels stream through."""

from __future__ import annotations

import contextlib
import mmap


def zeros(num_bytes: int) -> mmap.mmap:
    """Return zeros that use no memory and no time before they are touched, in large pages if the
    system supports them: fewer address translations while weights and caches are streamed. A tensor
    library can create a tensor from it without a copy."""
    memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # the kernel does not support large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
