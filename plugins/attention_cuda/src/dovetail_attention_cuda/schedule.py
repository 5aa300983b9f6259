"""Partition the attention of a step into pieces of work for the programs of kernels.py, using only
the lengths on the host.

Rows with few new tokens (decode, verification of drafts) have little parallel work if there are few
of them, so their context is split over programs. Other rows are divided into tiles of queries,
sorted by decreasing number of keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

SHORT_TILES = 4
"""Maximum number of tiles of the short shape in a short row."""
WAVES = (1, 2, 3, 4, 6, 8)
"""Candidates for the average number of pieces per program if contexts are split."""
PIECE_COST = 96
"""Fixed cost of a piece, in keys: it loads queries, fills the pipeline and stores a partial
result."""
MERGE_COST = 128
"""Cost of the merge per step, in keys of a program."""


@dataclass(frozen=True)
class Tiles:
    """Tiles of queries, each with the range of keys that it attends to."""

    row: I64
    first: I64
    """First token of the tile within its row."""
    begin: I64
    end: I64
    """The keys are `begin … end - 1`."""

    def __len__(self) -> int:
        return len(self.row)


def is_short(query_lens: I64, tokens: int) -> npt.NDArray[np.bool_]:
    """Return for each row whether it is short, given `tokens` query tokens per tile of the short
    shape."""
    return query_lens <= SHORT_TILES * tokens


def cut_queries(
    rows: I64, query_lens: I64, seq_lens: I64, tokens: int, window: int | None
) -> Tiles:
    """Return tiles of `tokens` query tokens of the given rows. `query_lens` and `seq_lens` are
    those of all rows."""
    counts = -(-query_lens[rows] // tokens)
    row = np.repeat(rows, counts)
    starts = np.cumsum(counts) - counts
    first = (np.arange(len(row)) - np.repeat(starts, counts)) * tokens
    computed = seq_lens[row] - query_lens[row]
    begin = np.zeros_like(row) if window is None else np.maximum(computed + first - window + 1, 0)
    return Tiles(row, first, begin, computed + np.minimum(first + tokens, query_lens[row]))


def most_pieces(num_tiles: int, num_programs: int, num_kv_heads: int) -> int:
    """Return an upper bound on the number of pieces that `split` returns."""
    return num_tiles + -(-num_programs * WAVES[-1] // num_kv_heads)


def choose_split(num_keys: I64, num_programs: int, num_kv_heads: int, unit: int) -> int:
    """Return the number of keys per piece, a multiple of `unit`, that minimizes the time of the
    busiest program."""
    total, longest = int(num_keys.sum()), int(num_keys.max())
    whole = -(-longest // unit) * unit
    best, least = whole, _rounds(len(num_keys), num_kv_heads, num_programs) * (longest + PIECE_COST)
    for waves in WAVES:
        split = max(1, -(-total * num_kv_heads // (num_programs * waves * unit))) * unit
        if split >= whole:
            continue
        pieces = int((-(-num_keys // split)).sum())
        cost = _rounds(pieces, num_kv_heads, num_programs) * (split + PIECE_COST) + MERGE_COST
        if cost < least:
            best, least = split, cost
    return best


def _rounds(pieces: int, num_kv_heads: int, num_programs: int) -> int:
    return -(-pieces * num_kv_heads // num_programs)


def split(tiles: Tiles, num_programs: int, num_kv_heads: int, unit: int) -> tuple[I32, I32, int]:
    """Return the pieces of the tiles, as `work` i32[num_work, 5] and `tiles` i32[num_tiles, 4] of
    kernels.py, and the number of partial results."""
    num_keys = tiles.end - tiles.begin
    size = choose_split(num_keys, num_programs, num_kv_heads, unit)
    counts = -(-num_keys // size)
    tile = np.repeat(np.arange(len(tiles)), counts)
    piece = np.arange(len(tile)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = tiles.begin[tile] + piece * size
    is_split = counts > 1
    partials = np.where(is_split, counts, 0)
    places = np.cumsum(partials) - partials
    place = np.where(is_split[tile], places[tile] + piece, -1)
    work = np.stack(
        [
            tiles.row[tile],
            tiles.first[tile],
            begin,
            np.minimum(begin + size, tiles.end[tile]),
            place,
        ],
        axis=1,
    )
    merged = np.stack([tiles.row, tiles.first, places, partials], axis=1)
    return work.astype(np.int32), merged.astype(np.int32), int(partials.sum())


def whole(tiles: Tiles) -> I32:
    """Return `work` for tiles that are not split, sorted by decreasing number of keys."""
    work = np.stack(
        [tiles.row, tiles.first, tiles.begin, tiles.end, np.full(len(tiles), -1)], axis=1
    )
    return work[np.argsort(tiles.begin - tiles.end, kind="stable")].astype(np.int32)
