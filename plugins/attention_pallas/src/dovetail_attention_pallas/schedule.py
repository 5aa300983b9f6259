"""A step's work for the kernel, from the lengths that the host knows: which query tile meets which
cache block.

Each row's new tokens are cut into tiles of one size; each tile meets its sequence's blocks from the
first that its first query sees to the last that its last query sees. Padded to powers of two, so
that a server's steps share a few compiled shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Array = Any
TILE = 32
"""Tokens in a query tile, at most. A tile's matrix has a row for each of them and each query head
that shares the KV head."""
NO_WINDOW = 2**30


class Schedule(NamedTuple):
    """T tokens, N tiles of `tile` tokens, W pieces of work (a tile and one block), each padded. All
    i32."""

    slot_mapping: Array
    """[T]: where each token's key and value go. Padding lies past any cache, and is dropped."""
    tile_tokens: Array
    """[N, tile]: the tokens of a tile. Places past its last token hold some token, whose result
    nobody reads."""
    token_place: Array
    """[T]: the place `n * tile + i` of each token."""
    tile_position: Array
    """[N]: of a tile's first query in its sequence."""
    tile_end: Array
    """[N]: one past the position of its last query."""
    tile_page: Array
    """[N]: the first block that it meets, counted in its sequence."""
    tile_work: Array
    """[N + 1]: tile n's work is `tile_work[n] … tile_work[n + 1] - 1`."""
    work_tile: Array
    """[W]; padding repeats the last, so that nothing is fetched or written for it."""
    work_block: Array
    """[W]: block ids; the block table, as far as it is read."""
    window: Array
    """[1]: a token sees itself and the `window - 1` tokens before it."""


def make_schedule(
    query_start: Sequence[int],
    seq_lens: Sequence[int],
    block_table: Any,
    slot_mapping: Any,
    block_size: int,
    window: int | None = None,
) -> Schedule:
    """Lengths `[B + 1]` and `[B]` are the host's; `block_table` `[B, max_blocks]` and
    `slot_mapping` `[T]` are any arrays that NumPy can read and index. At least one token. The
    answer shares no memory with them.
    """
    reach = NO_WINDOW if window is None else window
    starts, lens = np.asarray(query_start, np.int64), np.asarray(seq_lens, np.int64)
    num_new = np.diff(starts)
    num_tokens = int(starts[-1])
    tile = min(TILE, _power_of_two(int(num_new.max())))

    tiles_of_row = -(-num_new // tile)
    row, nth = _ragged(tiles_of_row)
    first = starts[row] + nth * tile
    size = np.minimum(tile, starts[row + 1] - first)
    position = lens[row] - num_new[row] + nth * tile
    end = position + size
    page = np.maximum(position - reach + 1, 0) // block_size
    num_pages = -(-end // block_size) - page

    work_tile, nth_page = _ragged(num_pages)
    blocks = np.asarray(block_table[row[work_tile], page[work_tile] + nth_page])
    tokens = np.minimum(first[:, None] + np.arange(tile), num_tokens - 1)
    of_token, nth_token = _ragged(size)
    return Schedule(
        slot_mapping=_pad(
            np.asarray(slot_mapping)[:num_tokens], num_tokens, np.iinfo(np.int32).max
        ),
        tile_tokens=_pad(tokens, len(row), 0),
        token_place=_pad(of_token * tile + nth_token, num_tokens, 0),
        tile_position=_pad(position, len(row), 0),
        tile_end=_pad(end, len(row), 0),
        tile_page=_pad(page, len(row), 0),
        tile_work=_pad(np.cumsum(np.append(0, num_pages)), len(row), len(work_tile)),
        work_tile=_pad(work_tile, len(work_tile), int(work_tile[-1])),
        work_block=_pad(blocks, len(work_tile), int(blocks[-1])),
        window=np.array([reach], np.int32),
    )


def padded(count: int) -> int:
    """The power of two that stands for `count` in a compiled shape."""
    return max(16, _power_of_two(count))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _ragged(counts: Any) -> tuple[Any, Any]:
    """For groups of so many members: the group of each member, and its place in the group."""
    group = np.repeat(np.arange(len(counts)), counts)
    return group, np.arange(len(group)) - np.repeat(np.cumsum(counts) - counts, counts)


def _pad(values: Any, count: int, fill: int) -> Any:
    """i32, with as many more of `fill` as pad `count` members."""
    out = np.full((len(values) + padded(count) - count, *values.shape[1:]), fill, np.int32)
    out[: len(values)] = values
    return out
