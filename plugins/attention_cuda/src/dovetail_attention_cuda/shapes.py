"""Shapes of tiles and launches, by what is asked of them."""

from __future__ import annotations

from dataclasses import dataclass

UNIT = 64
"""Pieces of a context are multiples of so many keys, and so of every launch's `block_n`."""
SHORT_PROGRAMS, LONG_PROGRAMS = 2, 1
"""Of the fixed grid, for each multiprocessor."""


@dataclass(frozen=True)
class Launch:
    """How a kernel is compiled."""

    block_n: int
    """Keys at a time."""
    num_warps: int
    num_stages: int


def power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()


def short_rows(group: int) -> int:
    """Query tokens × heads of a group in a tile of rows of few queries: what takes time is to read
    keys and values."""
    return max(16, power_of_two(group))


def long_rows(group: int, head_size: int) -> int:
    """The same for rows of many queries: what takes time is to multiply."""
    return max(128 if head_size <= 128 else 64, power_of_two(group))


def launch(block_m: int, head_size: int, query_bytes: int, key_bytes: int) -> Launch:
    """For tiles of `block_m` rows, in products of inputs of `query_bytes`, over a cache of
    `key_bytes` an element."""
    size = power_of_two(head_size)
    if query_bytes == 4:  # products without tensor cores, whose operands lie in registers
        return Launch(16 if size > 64 else 32, 8 if block_m * size > 4096 else 4, 1)
    if block_m <= 32:
        return Launch(64 if size <= 128 else 32, 4, 3 if size <= 128 and key_bytes > 1 else 2)
    return Launch(64 if size <= 128 else 32, 8 if block_m >= 128 else 4, 2)
