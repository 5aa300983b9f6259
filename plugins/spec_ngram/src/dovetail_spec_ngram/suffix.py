"""Drafting from what all requests have said: what did most go on with, of those that had just said
the same?

The outputs of ended sequences stand behind each other in one text. A dictionary has, of every short
n-gram, the latest places after it; a lookup takes these and narrows them down, token by token
backwards, to the places that agree longest: what a suffix tree of the text would find, at the price
of one entry a token, and with the oldest outputs easy to forget.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque

from dovetail.sequence import Sequence
from dovetail_spec_ngram.ngram import NgramDrafter

END = -1
"""In the text: an output ends here."""
MAX_PLACES = 64
"""Of one n-gram: the latest ones are enough to see what is usual, and bound a lookup."""


class EarlierOutputs:
    """The latest outputs, at most `max_tokens` tokens of them (each output counts one more, for its
    end)."""

    def __init__(self, ngram: int, max_match: int, max_tokens: int) -> None:
        self._ngram, self._max_match, self._max_tokens = ngram, max_match, max_tokens
        self._text = array("q")
        self._first = 0
        """Place of the text's first token, counted from the first that there ever was."""
        self._lengths: deque[int] = deque()
        """Of the outputs in the text, their ends included."""
        self._places: dict[tuple[int, ...], list[int]] = {}

    @property
    def num_tokens(self) -> int:
        return len(self._text)

    @property
    def num_ngrams(self) -> int:
        return len(self._places)

    def add(self, output: list[int]) -> None:
        """Take in an output; of one that is too long, its end. The oldest ones go to make room."""
        output = output[-(self._max_tokens - 1) :]
        if len(output) <= self._ngram:  # nothing in it follows an n-gram
            return
        while len(self._text) + len(output) + 1 > self._max_tokens:
            self._forget_oldest()
        start = self._first + len(self._text)
        for end, ngram in enumerate(self._ngrams(output), start + self._ngram):
            places = self._places.setdefault(ngram, [])
            if len(places) == MAX_PLACES:
                del places[0]
            places.append(end)
        self._text.extend([*output, END])
        self._lengths.append(len(output) + 1)

    def _ngrams(self, output: list[int]) -> list[tuple[int, ...]]:
        """Those that are followed by something, in order."""
        return list(
            zip(
                *(output[i : len(output) - self._ngram + i] for i in range(self._ngram)),
                strict=True,
            )
        )

    def _forget_oldest(self) -> None:
        length = self._lengths.popleft()
        for end, ngram in enumerate(
            self._ngrams(self._text[: length - 1].tolist()), self._first + self._ngram
        ):
            places = self._places[ngram]
            if places[0] == end:  # else it has already given way to later ones
                del places[0]
                if not places:
                    del self._places[ngram]
        del self._text[:length]
        self._first += length

    def continuation(self, tokens: list[int], count: int) -> list[int]:
        """At most `count` tokens: what most of the places that agree longest with the end of
        `tokens` say next, and after that most of those that said it; the latest decides between
        equals."""
        found = self._places.get(tuple(tokens[-self._ngram :]))
        if found is None:
            return []
        text, first = self._text, self._first
        places = [p - first for p in found]
        for back in range(self._ngram + 1, min(self._max_match, len(tokens)) + 1):
            token = tokens[-back]
            longer = [p for p in places if p >= back and text[p - back] == token]
            if not longer:
                break
            places = longer
        draft: list[int] = []
        while len(draft) < count:
            said = [text[p] for p in places]
            best = said[0] if len(said) == 1 else Counter(reversed(said)).most_common(1)[0][0]
            if best == END:
                break
            draft.append(best)
            places = [p + 1 for p, token in zip(places, said, strict=True) if token == best]
        return draft


class SuffixDrafter:
    """Earlier outputs first; where they know nothing, the sequence itself."""

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
