"""Compute the work of a step for the kernel from the lengths on the host: the pairs of query tiles
and cache blocks.

The new tokens of each row are divided into tiles of one size. Each tile is paired with the blocks
of its sequence from the first that its first query attends to, up to the last that its last query
attends to. Lists are padded to powers of two, so that the steps of a server share a few compiled
shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Array = Any
TILE = 32
"""Maximum number of tokens in a query tile. The matrix of a tile has a row for each of them and
each query head that shares the KV head."""
NO_WINDOW = 2**30


class Schedule(NamedTuple):
    """The work of a step with T tokens, N tiles of `tile` tokens and W pieces of work (a tile and
    one block), each padded. All arrays are i32."""

    slot_mapping: Array
    """[T]: slot to which the key and value of each token are written. Padding is beyond any cache
    and is dropped."""
    tile_tokens: Array
    """[N, tile]: tokens of each tile. Places after its last token have an arbitrary token, whose
    result is not used."""
    token_place: Array
    """[T]: the place `n * tile + i` of each token."""
    tile_position: Array
    """[N]: position in its sequence of the first query of each tile."""
    tile_end: Array
    """[N]: position of the last query of each tile, plus 1."""
    tile_page: Array
    """[N]: index in its sequence of the first block of each tile."""
    tile_work: Array
    """[N + 1]: the work of tile n is `tile_work[n] … tile_work[n + 1] - 1`."""
    work_tile: Array
    """[W]: tile of each piece of work. Padding repeats the last tile, so that nothing is loaded or
    stored for it."""
    work_block: Array
    """[W]: block id of each piece of work."""
    window: Array
    """[1]: a token attends to itself and the `window - 1` tokens before it."""


def make_schedule(
    query_start: Sequence[int],
    seq_lens: Sequence[int],
    block_table: Any,
    slot_mapping: Any,
    block_size: int,
    window: int | None = None,
) -> Schedule:
    """Return the schedule of a step with at least one token.

    `query_start` `[B + 1]` and `seq_lens` `[B]` are on the host. `block_table` `[B, max_blocks]`
    and `slot_mapping` `[T]` are any arrays that NumPy can read and index. The result does not share
    memory with them.
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
    """Return `count` padded to the size in compiled shapes: a power of two, at least 16."""
    return max(16, _power_of_two(count))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _ragged(counts: Any) -> tuple[Any, Any]:
    """Return the group of each member and its index in the group, for groups with the given numbers
    of members."""
    group = np.repeat(np.arange(len(counts)), counts)
    return group, np.arange(len(group)) - np.repeat(np.cumsum(counts) - counts, counts)


def _pad(values: Any, count: int, fill: int) -> Any:
    """Return the values as i32, followed by as many `fill` values as pad `count` members."""
    out = np.full((len(values) + padded(count) - count, *values.shape[1:]), fill, np.int32)
    out[: len(values)] = values
    return out
