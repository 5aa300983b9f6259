"""How much memory the KV cache may take."""

from __future__ import annotations

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
