"""How much memory the KV cache may take, and giving back what reading the weights has left over."""

from __future__ import annotations

import contextlib
import ctypes

from dovetail.facts import available_memory

CPU_DEFAULT = 4 * 2**30


def cpu_memory(fraction: float) -> int:
    """Bytes: of what is available (in a container: within its limit), up to 4 GiB. A CPU's memory
    is shared with everything else, so more is taken only when `kv_cache.memory_gb` asks for it."""
    available = available_memory()
    return min(CPU_DEFAULT, int((CPU_DEFAULT if available is None else available) * fraction))


def give_back() -> None:
    """Main memory that is free, and that the C library keeps for what comes next, goes back to the
    system.

    While layers are brought into another form, tensors of many sizes come and go: a third of the
    weights' size may stay.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
