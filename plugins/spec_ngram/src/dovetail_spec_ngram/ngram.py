"""Prompt lookup: what followed the last tokens the last time they stood here may follow them again.

For each length n a dictionary has, of every n-gram that is followed by something, where it last
ended. A step adds the n-grams of its new tokens, so its cost does not depend on the length of the
text.
"""

from __future__ import annotations

from dovetail.sequence import Sequence

Ngram = tuple[int, ...]


class NgramIndex:
    """Of one sequence, whose tokens are only ever appended to."""

    def __init__(self, max_ngram: int, min_ngram: int) -> None:
        self._ends: dict[int, dict[Ngram, int]] = {
            n: {} for n in range(max_ngram, min_ngram - 1, -1)
        }
        """By length, the longest first: n-gram to the place after its last occurrence but the one
        that ends the text."""
        self._len = 0

    def extend(self, tokens: list[int]) -> None:
        """Take in what was appended to `tokens` since the last call."""
        length = len(tokens)
        for n, ends in self._ends.items():
            first = max(n, self._len)
            if first < length:
                new = tokens[first - n : length - 1]
                ends.update(
                    zip(
                        zip(*(new[i:] for i in range(n)), strict=False),
                        range(first, length),
                        strict=True,
                    )
                )
        self._len = length

    def continuation(self, tokens: list[int], count: int) -> list[int]:
        """`count` tokens that followed the longest known end of `tokens`; none if no end is
        known."""
        for n, ends in self._ends.items():
            start = ends.get(tuple(tokens[-n:]))
            if start is not None:
                # Where the copy reaches the end of the text it goes on in itself: a text that
                # repeats itself has a period.
                period = len(tokens) - start
                copy = tokens[start : start + count]
                return copy if count <= period else (copy * (count // period + 1))[:count]
        return []


class NgramDrafter:
    """An index for each sequence that it was asked about."""

    def __init__(self, max_ngram: int, min_ngram: int) -> None:
        self._lengths = max_ngram, min_ngram
        self._indexes: dict[int, NgramIndex] = {}

    def propose(self, seq: Sequence, max_tokens: int) -> list[int]:
        index = self._indexes.get(seq.seq_id)
        if index is None:
            index = self._indexes[seq.seq_id] = NgramIndex(*self._lengths)
        index.extend(seq.tokens)
        return index.continuation(seq.tokens, max_tokens)

    def forget(self, seq_id: int) -> None:
        self._indexes.pop(seq_id, None)
