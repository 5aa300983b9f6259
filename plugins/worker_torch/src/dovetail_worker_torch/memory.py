"""How much memory the KV cache may take, and giving back what reading the weights has left over."""

from __future__ import annotations

import contextlib
import ctypes

CPU_DEFAULT = 4 * 2**30


def cpu_memory(fraction: float) -> int:
    """Bytes: of what is available, up to 4 GiB. A CPU's memory is shared with everything else, so more is taken only when
    `kv_cache.memory_gb` asks for it."""
    return min(CPU_DEFAULT, int(available_memory() * fraction))


def available_memory() -> int:
    """Bytes of main memory that can be had without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return CPU_DEFAULT


def give_back() -> None:
    """Main memory that is free, and that the C library keeps for what comes next, goes back to the system.

    While layers are brought into another form, tensors of many sizes come and go: a third of the weights' size may stay.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
