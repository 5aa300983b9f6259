"""Implement prompt lookup: propose the tokens that followed the last occurrence of the sequence's
final n-gram.

For each length n, a dictionary maps every n-gram that has a continuation to the end of its last
occurrence. A step adds the n-grams of its new tokens, so its cost does not depend on the length of
the text.
"""

from __future__ import annotations

from dovetail.sequence import Sequence

Ngram = tuple[int, ...]


class NgramIndex:
    """The n-grams of one sequence, to which tokens are only ever appended."""

    def __init__(self, max_ngram: int, min_ngram: int) -> None:
        self._ends: dict[int, dict[Ngram, int]] = {
            n: {} for n in range(max_ngram, min_ngram - 1, -1)
        }
        """For each length, longest first: n-gram to the position after its last occurrence, not
        counting an occurrence at the end of the text."""
        self._len = 0

    def extend(self, tokens: list[int]) -> None:
        """Add the n-grams of tokens that were appended since the last call."""
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
        """Return `count` tokens that followed the longest known n-gram at the end of `tokens`, or
        an empty list if none is known."""
        for n, ends in self._ends.items():
            start = ends.get(tuple(tokens[-n:]))
            if start is not None:
                # If the copy reaches the end of the text, it continues with itself, as repetitive
                # text is periodic.
                period = len(tokens) - start
                copy = tokens[start : start + count]
                return copy if count <= period else (copy * (count // period + 1))[:count]
        return []


class NgramDrafter:
    """The drafter `ngram`, with one index per sequence."""

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
