"""How much memory the KV cache may take, and giving back what reading the weights has left over."""

from __future__ import annotations

import contextlib
import ctypes

import torch

CPU_DEFAULT = 4 * 2**30


def kv_memory(device: torch.device, fraction: float, gigabytes: float | None) -> int:
    """Bytes. On a GPU, `fraction` of all memory less what is taken; on a CPU, of what is available, up to 4 GiB.

    A CPU's memory is shared with everything else, so more than that is taken only when `gigabytes` asks for it.
    """
    if gigabytes is not None:
        return int(gigabytes * 2**30)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, int(total * fraction) - (total - free))
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
