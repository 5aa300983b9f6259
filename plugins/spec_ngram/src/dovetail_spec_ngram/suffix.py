"""Implement suffix drafting: propose how most earlier outputs continued after the same tokens.

The outputs of finished sequences are concatenated to one text. A dictionary maps every n-gram of
fixed length to the latest positions after it. A lookup starts with these and narrows them down,
token by token backwards, to the positions with the longest match. This finds what a suffix tree of
the text would find, with one entry per token, and the oldest outputs are easy to drop.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque

from dovetail.sequence import Sequence
from dovetail_spec_ngram.ngram import NgramDrafter

END = -1
"""Marks the end of an output in the text."""
MAX_POSITIONS = 64
"""Maximum number of positions per n-gram: the latest ones show what is usual, and the limit bounds
a lookup."""


class EarlierOutputs:
    """The latest outputs, at most `max_tokens` tokens. Each output counts one more for its end
    marker."""

    def __init__(self, ngram: int, max_match: int, max_tokens: int) -> None:
        self._ngram, self._max_match, self._max_tokens = ngram, max_match, max_tokens
        self._text = array("q")
        self._first = 0
        """Position of the text's first token, counted from the first token ever added."""
        self._lengths: deque[int] = deque()
        """Lengths of the outputs in the text, end markers included."""
        self._positions: dict[tuple[int, ...], list[int]] = {}

    @property
    def num_tokens(self) -> int:
        return len(self._text)

    @property
    def num_ngrams(self) -> int:
        return len(self._positions)

    def add(self, output: list[int]) -> None:
        """Add an output, dropping the oldest ones to make room. Of an output that is too long, the
        end is added."""
        output = output[-(self._max_tokens - 1) :]
        if len(output) <= self._ngram:  # no n-gram in it has a continuation
            return
        while len(self._text) + len(output) + 1 > self._max_tokens:
            self._drop_oldest()
        start = self._first + len(self._text)
        for end, ngram in enumerate(self._ngrams(output), start + self._ngram):
            positions = self._positions.setdefault(ngram, [])
            if len(positions) == MAX_POSITIONS:
                del positions[0]
            positions.append(end)
        self._text.extend([*output, END])
        self._lengths.append(len(output) + 1)

    def _ngrams(self, output: list[int]) -> list[tuple[int, ...]]:
        """Return the n-grams that have a continuation, in order."""
        return list(
            zip(
                *(output[i : len(output) - self._ngram + i] for i in range(self._ngram)),
                strict=True,
            )
        )

    def _drop_oldest(self) -> None:
        length = self._lengths.popleft()
        for end, ngram in enumerate(
            self._ngrams(self._text[: length - 1].tolist()), self._first + self._ngram
        ):
            positions = self._positions[ngram]
            if positions[0] == end:  # otherwise later positions have already replaced it
                del positions[0]
                if not positions:
                    del self._positions[ngram]
        del self._text[:length]
        self._first += length

    def continuation(self, tokens: list[int], count: int) -> list[int]:
        """Return at most `count` tokens: repeatedly the most frequent next token among the
        positions with the longest match, keeping the positions that have it. Ties are resolved in
        favour of the latest position."""
        matches = self._positions.get(tuple(tokens[-self._ngram :]))
        if matches is None:
            return []
        text, first = self._text, self._first
        positions = [p - first for p in matches]
        for distance in range(self._ngram + 1, min(self._max_match, len(tokens)) + 1):
            token = tokens[-distance]
            longer = [p for p in positions if p >= distance and text[p - distance] == token]
            if not longer:
                break
            positions = longer
        draft: list[int] = []
        while len(draft) < count:
            next_tokens = [text[p] for p in positions]
            best = (
                next_tokens[0]
                if len(next_tokens) == 1
                else Counter(reversed(next_tokens)).most_common(1)[0][0]
            )
            if best == END:
                break
            draft.append(best)
            positions = [
                p + 1 for p, token in zip(positions, next_tokens, strict=True) if token == best
            ]
        return draft


class SuffixDrafter:
    """The drafter `suffix`: proposes from earlier outputs, or from the sequence itself if they have
    no match."""

    def __init__(self, earlier: EarlierOutputs, own: NgramDrafter) -> None:
        self.earlier = earlier
        self._own = own
        self._running: dict[int, Sequence] = {}

    def propose(self, seq: Sequence, max_tokens: int) -> list[int]:
        self._running[seq.seq_id] = seq
        return self.earlier.continuation(seq.tokens, max_tokens) or self._own.propose(
            seq, max_tokens
        )

    def forget(self, seq_id: int) -> None:
        self._own.forget(seq_id)
        seq = self._running.pop(seq_id, None)
        if seq is not None:
            self.earlier.add(seq.tokens[seq.num_prompt_tokens :])
