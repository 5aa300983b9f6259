"""Test both drafters against the contract of drafters, and against a search through the whole
text."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dovetail.sequence import Sequence
from dovetail.types import Request, SamplingParams
from dovetail_spec_ngram import NGRAM, SUFFIX, NgramOptions, SuffixOptions
from dovetail_spec_ngram.ngram import NgramDrafter, NgramIndex
from dovetail_spec_ngram.suffix import MAX_POSITIONS, EarlierOutputs, SuffixDrafter
from dovetail_testing.drafter import DrafterContract

few_tokens = st.lists(st.integers(0, 2), max_size=60)
outputs = st.lists(few_tokens, max_size=12)


class TestNgram(DrafterContract):
    provider = NGRAM


class TestSuffix(DrafterContract):
    provider = SUFFIX


def searched(tokens: list[int], max_ngram: int, min_ngram: int, count: int) -> list[int]:
    """Implement prompt lookup by definition: for each length, search from the end of the text
    backwards."""
    for n in range(max_ngram, min_ngram - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[len(tokens) - n :]:
                text = list(tokens)
                for i in range(count):
                    text.append(text[end + i])
                return text[len(tokens) :]
    return []


@given(
    few_tokens,
    st.lists(st.integers(1, 7)),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(1, 20),
)
def test_ngram_finds_what_a_search_finds_however_the_text_came(
    tokens: list[int], pieces: list[int], min_ngram: int, more: int, count: int
) -> None:
    index, length = NgramIndex(min_ngram + more, min_ngram), 0
    for piece in [*pieces, len(tokens)]:
        length = min(len(tokens), length + piece)
        index.extend(tokens[:length])
        assert index.continuation(tokens[:length], count) == searched(
            tokens[:length], min_ngram + more, min_ngram, count
        )


def voted(
    kept: list[list[int]], tokens: list[int], ngram: int, max_match: int, count: int
) -> list[int]:
    """Implement suffix drafting by definition: all positions, the length of their matches with the
    end of the text, votes."""
    end = -1
    text: list[int] = [token for output in kept for token in [*output, end]]
    places = [
        p
        for p in range(ngram, len(text))
        if text[p - 1] != end and text[p - ngram : p] == tokens[len(tokens) - ngram :]
    ]
    places = [p for p in places if text[p] != end][-MAX_POSITIONS:] if len(tokens) >= ngram else []

    def agreement(place: int) -> int:
        n = 0
        while (
            n < min(max_match, len(tokens))
            and place - n > 0
            and text[place - n - 1] == tokens[-n - 1]
        ):
            n += 1
        return n

    longest = max(map(agreement, places), default=0)
    places = [p for p in places if agreement(p) == longest]
    draft: list[int] = []
    while places and len(draft) < count:
        votes = Counter(text[p] for p in places)
        best = max(
            votes, key=lambda token: (votes[token], max(p for p in places if text[p] == token))
        )
        if best == end:
            break
        draft.append(best)
        places = [p + 1 for p in places if text[p] == best]
    return draft


@given(outputs, few_tokens, st.integers(1, 3), st.integers(0, 4), st.integers(1, 9))
def test_suffix_says_what_most_of_the_longest_matches_say(
    said: list[list[int]], tokens: list[int], ngram: int, more: int, count: int
) -> None:
    earlier = EarlierOutputs(ngram, ngram + more, 10_000)
    for output in said:
        earlier.add(output)
    kept = [o for o in said if len(o) > ngram]
    assert earlier.continuation(tokens, count) == voted(kept, tokens, ngram, ngram + more, count)


@given(outputs, few_tokens, st.integers(1, 3), st.integers(5, 100))
def test_suffix_forgets_the_oldest_and_nothing_of_them_is_left(
    said: list[list[int]], tokens: list[int], ngram: int, max_tokens: int
) -> None:
    earlier = EarlierOutputs(ngram, 8, max_tokens)
    for output in said:
        earlier.add(output)
        assert earlier.num_tokens <= max_tokens
    kept: list[list[int]] = []
    for output in reversed([o[-(max_tokens - 1) :] for o in said]):
        if len(output) > ngram:
            if sum(len(o) + 1 for o in kept) + len(output) + 1 > max_tokens:
                break
            kept.insert(0, output)
    fresh = EarlierOutputs(ngram, 8, 10_000)
    for output in kept:
        fresh.add(output)
    assert earlier.num_tokens == fresh.num_tokens
    # With more tokens, the latest positions may have replaced old ones before their output was
    # dropped.
    if sum(map(len, said)) <= MAX_POSITIONS:
        assert earlier.continuation(tokens, 9) == fresh.continuation(tokens, 9)
        assert earlier.num_ngrams == fresh.num_ngrams


def sequence(seq_id: int, prompt: list[int], output: list[int]) -> Sequence:
    return Sequence(
        seq_id, Request(f"r{seq_id}", prompt, SamplingParams(), 99, 0, []), 0, prompt + output
    )


def test_suffix_learns_outputs_and_not_prompts_when_a_sequence_ends() -> None:
    drafter = SuffixDrafter(EarlierOutputs(2, 8, 1000), NgramDrafter(3, 2))
    first = sequence(0, [1, 2, 3, 4], [5, 6])
    drafter.propose(first, 4)
    first.tokens += [7, 8]
    assert drafter.propose(sequence(1, [5, 6], []), 4) == []
    drafter.forget(0)
    assert drafter.propose(sequence(1, [5, 6], []), 4) == [7, 8]
    assert drafter.propose(sequence(2, [1, 2], []), 4) == []
    assert drafter.propose(sequence(3, [1, 2, 9, 1, 2], []), 2) == [9, 1]


@pytest.mark.parametrize(
    ("options", "values"),
    [
        (NgramOptions, {"max_ngram": 2, "min_ngram": 3}),
        (NgramOptions, {"min_ngram": 0}),
        (NgramOptions, {"max_ngram": 17}),
        (NgramOptions, {"num_draft_tokens": 0}),
        (NgramOptions, {"num_draft_tokens": 33}),
        (SuffixOptions, {"max_tokens": 10}),
        (SuffixOptions, {"max_match": 0}),
        (NgramOptions, {"ngram": 3}),
    ],
)
def test_options_out_of_range_are_refused(options: Any, values: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        options(**values)
