"""Choose the shapes of tiles and launches."""

from __future__ import annotations

from dataclasses import dataclass

UNIT = 64
"""The number of keys of a piece is a multiple of this, and therefore of every launch's
`block_n`."""
SHORT_PROGRAMS, LONG_PROGRAMS = 2, 1
"""Number of programs of the fixed grid per multiprocessor."""


@dataclass(frozen=True)
class Launch:
    """Compile-time parameters of a kernel."""

    block_n: int
    """Number of keys per iteration."""
    num_warps: int
    num_stages: int


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def short_rows(group: int) -> int:
    """Return the number of query tokens × heads of a group in a tile of short rows, which are bound
    by reading keys and values."""
    return max(16, power_of_two(group))


def long_rows(group: int, head_size: int) -> int:
    """Return the same for rows of many queries, which are bound by arithmetic."""
    return max(128 if head_size <= 128 else 64, power_of_two(group))


def launch(block_m: int, head_size: int, query_bytes: int, key_bytes: int) -> Launch:
    """Return the launch for tiles of `block_m` rows, with products of `query_bytes`-byte inputs and
    a cache with `key_bytes` bytes per element."""
    size = power_of_two(head_size)
    if query_bytes == 4:  # products without tensor cores have their operands in registers
        return Launch(16 if size > 64 else 32, 8 if block_m * size > 4096 else 4, 1)
    if block_m <= 32:
        return Launch(64 if size <= 128 else 32, 4, 3 if size <= 128 and key_bytes > 1 else 2)
    return Launch(64 if size <= 128 else 32, 8 if block_m >= 128 else 4, 2)
