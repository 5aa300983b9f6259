"""Memory for what kernels stream through."""

from __future__ import annotations

import contextlib
import mmap


def zeros(num_bytes: int) -> mmap.mmap:
    """Zeros that take no memory and no time before they are touched, in large pages where the
    system has them: fewer address translations as weights and caches stream by. A tensor library
    makes a tensor of it without a copy."""
    memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
