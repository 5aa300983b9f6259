"""Prefault the memory of the KV cache before a step writes to it.

The operating system allocates and clears a page when it is first touched. This takes about 0.1 ms
for a huge page, and 5 ms in a virtual machine whose host also allocates on first touch. All layers
reach the end of a page in the same step, so this step would wait for one page per layer, and all
streams would stall. See benchmarks/first_touch.py.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import sys
import threading
import time
import weakref

log = logging.getLogger("dovetail.attention_cpu")

AHEAD = 64 * 2**20
"""Bytes, over all layers, that are prefaulted ahead of their use. The limit keeps the memory of a
lightly loaded engine small."""
PIECE = 2 * 2**20
"""Bytes that are prefaulted at a time: a huge page."""
PAUSE = 0.005
"""Seconds between two pieces, so that a concurrent step keeps most of the CPU."""
MADV_POPULATE_WRITE = 23
"""Faults pages in as a write would, without changing their content. Since Linux 5.14."""
_madvise = ctypes.CDLL(None, use_errno=True).madvise  # mmap.madvise holds the GIL
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Ahead:
    """Prefaults the caches of all layers ahead of the highest slot in use. It suits block managers
    that allocate low block ids first, as the built-in ones do. Not thread-safe."""

    def __init__(self, num_bytes: int = AHEAD) -> None:
        self._num_bytes = num_bytes
        self._memories: list[tuple[weakref.ref[mmap.mmap], int]] = []
        self._present = self._due = 0
        """Number of slots that are prefaulted, or will be when the last thread ends; and the slot
        that triggers the next prefault."""

    def add(self, memory: mmap.mmap, num_slots: int) -> None:
        """Register the cache of a layer. Only a weak reference is kept."""
        self._memories.append((weakref.ref(memory), num_slots))
        self._present = self._due = 0

    def reach(self, slot: int) -> None:
        """Note that `slot` is the highest slot of a step. If it is near the end of the prefaulted
        slots, prefault more in a new thread."""
        if slot < self._due:
            return
        self._memories = [
            (memory, num_slots) for memory, num_slots in self._memories if memory() is not None
        ]
        memories = [
            (memory, num_slots)
            for ref, num_slots in self._memories
            if (memory := ref()) is not None
        ]
        if not memories:
            return
        bytes_each = max(PIECE, self._num_bytes // len(memories))
        ahead = max(bytes_each * num_slots // len(memory) for memory, num_slots in memories)
        first, self._present = self._present, slot + 1 + ahead
        is_all = self._present >= max(num_slots for _, num_slots in memories)
        self._due = sys.maxsize if is_all else self._present - ahead // 2
        threading.Thread(
            target=self._populate, args=(memories, first, self._present), daemon=True
        ).start()

    def _populate(self, memories: list[tuple[mmap.mmap, int]], first: int, last: int) -> None:
        """Prefault the slots [first, last) of all layers, advancing all layers at the same rate."""
        parts = []
        for memory, num_slots in memories:
            begin, end = (len(memory) * min(slot, num_slots) // num_slots for slot in (first, last))
            begin -= begin % mmap.PAGESIZE
            parts += [
                (at - begin, memory, at, min(PIECE, end - at)) for at in range(begin, end, PIECE)
            ]
        for _, memory, at, size in sorted(parts, key=lambda part: part[0]):
            if _madvise(
                ctypes.addressof(ctypes.c_char.from_buffer(memory, at)), size, MADV_POPULATE_WRITE
            ):
                why = os.strerror(ctypes.get_errno())
                log.info(
                    "cannot prefault the memory of the KV cache (%s): steps wait when they first"
                    " use it",
                    why,
                )
                self._due = sys.maxsize
                return
            time.sleep(PAUSE)
