"""The work list of a step covers every visible key of every query once and fits its buffer."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dovetail_attention_cuda.schedule import cut_queries, most_pieces, split, whole

ROWS = st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 300)), min_size=1, max_size=40)
"""(number of computed tokens, number of new tokens) of each row."""


def tiles_of(rows, tokens, window):
    query_lens = np.array([new for _, new in rows])
    seq_lens = np.array([computed + new for computed, new in rows])
    return cut_queries(np.arange(len(rows)), query_lens, seq_lens, tokens, window)


@given(ROWS, st.integers(1, 64), st.none() | st.integers(1, 700))
def test_tiles_cover_the_queries_and_what_they_see(rows, tokens, window):
    tiles = tiles_of(rows, tokens, window)
    covered = {
        (row, first + i)
        for row, first in zip(tiles.row, tiles.first, strict=True)
        for i in range(tokens)
    }
    assert {(r, t) for r, (_, new) in enumerate(rows) for t in range(new)} <= covered
    for row, first, begin, end in zip(tiles.row, tiles.first, tiles.begin, tiles.end, strict=True):
        computed, new = rows[row]
        last = min(first + tokens, new) - 1
        assert end == computed + last + 1
        assert begin == (0 if window is None else max(0, computed + first - window + 1))


@given(
    ROWS,
    st.integers(1, 64),
    st.none() | st.integers(1, 700),
    st.integers(1, 300),
    st.integers(1, 16),
)
def test_pieces_cover_the_keys_once(rows, tokens, window, num_programs, num_kv_heads):
    tiles = tiles_of(rows, tokens, window)
    work, merged, num_partials = split(tiles, num_programs, num_kv_heads, 64)
    assert len(work) <= most_pieces(len(tiles), num_programs, num_kv_heads)
    places = []
    for i, (row, first, place, count) in enumerate(merged):
        assert (row, first) == (tiles.row[i], tiles.first[i])
        mine = work[(work[:, 0] == row) & (work[:, 1] == first)]
        assert mine[0, 2] == tiles.begin[i]
        assert mine[-1, 3] == tiles.end[i]
        np.testing.assert_array_equal(mine[1:, 2], mine[:-1, 3])
        assert (mine[:, 3] > mine[:, 2]).all()
        np.testing.assert_array_equal(mine[:, 4], range(place, place + count) if count else [-1])
        places += range(place, place + count)
    assert places == list(range(num_partials))


@given(ROWS, st.integers(1, 64))
def test_whole_tiles_come_longest_first(rows, tokens):
    tiles = tiles_of(rows, tokens, None)
    work = whole(tiles)
    assert sorted(map(tuple, work[:, :4])) == sorted(
        zip(tiles.row, tiles.first, tiles.begin, tiles.end, strict=True)
    )
    assert (np.diff(work[:, 3] - work[:, 2]) <= 0).all()


def test_one_long_row_is_split_over_the_device():
    """With 132 multiprocessors, 2 programs each and 8 KV heads, 33 pieces give every program one
    item."""
    work, _, _ = split(tiles_of([(32_767, 1)], 4, None), 264, 8, 64)
    assert len(work) * 8 / 264 / -(-len(work) * 8 // 264) >= 0.8
    assert len(work) >= 28


def test_many_rows_of_equal_length_are_left_whole_where_that_is_as_good():
    work, merged, num_partials = split(tiles_of([(1023, 1)] * 264, 4, None), 264, 8, 64)
    assert len(work) == 264
    assert num_partials == 0
    assert not merged[:, 3].any()
