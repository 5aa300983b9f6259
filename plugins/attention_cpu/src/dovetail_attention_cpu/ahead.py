"""Memory of the KV cache that is present before a step writes to it.

The system hands memory out when it is first touched, and clears it then: some 0.1 ms for a large
page, and 5 ms in a virtual machine whose host does the same with its own. As all layers come to the
end of a page together, one step would pay for as many pages as there are layers, and every stream
would wait for it. See benchmarks/first_touch.py.
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
"""Bytes, over all layers, that are made present before they are used: an engine that does little
takes little memory."""
PIECE = 2 * 2**20
"""A large page."""
PAUSE = 0.005
"""Seconds between two pieces: the step that runs meanwhile keeps most of its cores."""
MADV_POPULATE_WRITE = 23
"""Linux 5.14; touches pages as a write would, and leaves what is in them."""
_madvise = ctypes.CDLL(None, use_errno=True).madvise  # mmap.madvise keeps Python's lock
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Ahead:
    """For caches that fill up from their beginning, as they do with the built-in block managers.
    Not thread-safe."""

    def __init__(self, num_bytes: int = AHEAD) -> None:
        self._num_bytes = num_bytes
        self._memories: list[tuple[weakref.ref[mmap.mmap], int]] = []
        self._present = self._due = 0
        """Slots that are present, or will be when the last thread has ended; and the one at which
        to get more."""

    def add(self, memory: mmap.mmap, num_slots: int) -> None:
        """A layer's cache. It lives as long as whoever uses it wants."""
        self._memories.append((weakref.ref(memory), num_slots))
        self._present = self._due = 0

    def reach(self, slot: int) -> None:
        """A step uses this slot, and none after it: if it is near the end of what is present, let a
        thread get more."""
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
        """From a slot to another, in all layers at one pace."""
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
                    "steps wait for memory of the KV cache when they first use it: it cannot be had"
                    " ahead (%s)",
                    why,
                )
                self._due = sys.maxsize
                return
            time.sleep(PAUSE)
