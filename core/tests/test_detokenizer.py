"""Incremental detokenization equals decoding the whole, for every kind of tokenizer and every cut,
in linear time."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from dovetail.frontend.detokenizer import detokenizer
from dovetail.frontend.tokenizer import Tokenizer
from dovetail_testing.plugin import make_model

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ALPHABET = "abcdé ßжあ🦊👩‍👩‍👧☃"
"""Of the texts: characters of one to four bytes, some of which are tokens."""


def byte_level() -> RawTokenizer:
    """As GPT-2, Llama 3 and Qwen."""
    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return raw


def sentence_piece(*, strip: bool) -> RawTokenizer:
    """As Llama 2 and Mistral (with `strip`), or Gemma."""
    vocab = {token: i for i, token in enumerate(["<unk>", "▁", *"abcd", "▁a", "é", "ß", *BYTES])}
    raw = RawTokenizer(
        models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>")
    )
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if strip else steps)
    chain: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    raw.decoder = decoders.Sequence([*chain, decoders.Strip(" ", 1, 0)] if strip else chain)
    return raw


def word_piece() -> RawTokenizer:
    vocab = {
        token: i
        for i, token in enumerate(["[UNK]", *"abcd", *(f"##{c}" for c in "abcd"), "é", ".", "'"])
    }
    raw = RawTokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.decoder = decoders.WordPiece()
    return raw


RAW = {
    "byte level": byte_level(),
    "sentence piece": sentence_piece(strip=False),
    "sentence piece, stripped": sentence_piece(strip=True),
    "word piece": word_piece(),
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    found = {}
    for name, raw in RAW.items():
        folder = make_model(tmp_path_factory.mktemp("kind"))
        raw.add_special_tokens(["<s>", "</s>"])
        raw.add_tokens([AddedToken("<tool>", special=False)])
        raw.save(str(folder / "tokenizer.json"))
        found[name] = Tokenizer(folder)
    return found


def pushed(
    tokenizer: Tokenizer, prompt: list[int], ids: list[int], cuts: list[int], *, skip: bool
) -> str:
    decoding, text = detokenizer(tokenizer, prompt, skip_special_tokens=skip), ""
    bounds = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    for begin, end in pairwise(bounds):
        text += decoding.push(ids[begin:end])
    return text + decoding.flush()


@settings(max_examples=400, deadline=None)
@given(
    kind=st.sampled_from(sorted(RAW)),
    parts=st.lists(
        st.text(ALPHABET, max_size=8) | st.sampled_from(["<s>", "</s>", "<tool>", "."]), max_size=8
    ),
    at=st.integers(0, 400),
    cuts=st.lists(st.integers(0, 200), max_size=8),
    skip=st.booleans(),
    hidden=st.integers(0, 40),
)
@example(kind="sentence piece", parts=["ab🦊🦊", "\n hé"], at=10, cuts=[], skip=True, hidden=0)
@example(kind="sentence piece", parts=["🦊🦊🦊🦊"], at=7, cuts=[], skip=True, hidden=0)
@example(
    kind="sentence piece, stripped", parts=["a", "</s>", " a"], at=0, cuts=[1], skip=True, hidden=40
)
def test_every_cut_of_a_text_decodes_to_the_whole(
    kinds: dict[str, Tokenizer],
    kind: str,
    parts: list[str],
    at: int,
    cuts: list[int],
    skip: bool,
    hidden: int,
) -> None:
    """Cut into prompt and output, and the output into pushes, anywhere, within characters too.
    Tokens without text (special ones, ids outside the vocabulary) lie between."""
    tokenizer = kinds[kind]
    ids = tokenizer.encode("".join(parts), add_special_tokens=False)
    at %= len(ids) + 1
    prompt, output = ids[:at], [tokenizer.vocab_size + 7] * hidden + ids[at:]
    # A character that the prompt leaves incomplete belongs to the output.
    unfinished = next(
        n for n in range(4) if not tokenizer.decode(prompt[: at - n]).endswith("\ufffd")
    )
    whole, before = (
        tokenizer.decode(x, skip_special_tokens=skip) for x in (ids, prompt[: at - unfinished])
    )
    expected = whole.removeprefix(before) if at < len(ids) else ""
    assert pushed(tokenizer, prompt, output, cuts, skip=skip) == expected


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(sorted(RAW)), data=st.data())
def test_any_tokens_say_the_same_however_they_are_cut(
    kinds: dict[str, Tokenizer], kind: str, data: st.DataObject
) -> None:
    tokenizer = kinds[kind]
    some = st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=60)
    prompt, ids = data.draw(some), data.draw(some)
    cuts, skip = data.draw(st.lists(st.integers(0, 60), max_size=6)), data.draw(st.booleans())
    one_by_one = pushed(tokenizer, prompt, ids, list(range(len(ids))), skip=skip)
    assert pushed(tokenizer, prompt, ids, cuts, skip=skip) == one_by_one
    if kind == "byte level" and not prompt:
        assert one_by_one == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", sorted(RAW))
@pytest.mark.parametrize("what", ["special", "unknown", "bytes"])
def test_the_window_stays_short(
    kinds: dict[str, Tokenizer], kind: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens decoded in all grow with the number of tokens, not with its square, whatever the
    tokens are."""
    tokenizer = kinds[kind]
    tokens = {
        "special": tokenizer.token_id("</s>"),
        "unknown": tokenizer.vocab_size + 9,
        "bytes": tokenizer.token_id("<0xFF>"),
    }
    token = tokens[what] or 0
    decoded = 0
    plain = Tokenizer.decode

    def counted(self: Tokenizer, token_ids: list[int], **how: Any) -> str:
        nonlocal decoded
        decoded += len(token_ids)
        return plain(self, token_ids, **how)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    decoding = detokenizer(tokenizer, [token] * 2000)
    for _ in range(2000):
        decoding.push([token])
    assert decoded <= 2000 * 40
