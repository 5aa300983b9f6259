"""Text in and out: tokenizer, incremental detokenization, stop strings, and what is refused."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers

from dovetail.errors import CheckpointError, InvalidRequest
from dovetail.facts import model_facts
from dovetail.frontend.detokenizer import StopStrings, detokenizer
from dovetail.frontend.outputs import Delta, RequestState
from dovetail.frontend.requests import RequestMaker
from dovetail.frontend.tokenizer import Tokenizer
from dovetail.types import SamplingParams, SequenceOutput
from dovetail_testing.plugin import make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """SentencePiece style: characters that are no tokens fall back to bytes, and spaces are
    underscores."""
    folder = make_model(tmp_path_factory.mktemp("fallback"))
    letters = ["<unk>", "▁", *"abcdefghij", *(f"<0x{b:02X}>" for b in range(256))]
    vocab = {t: i for i, t in enumerate(letters)}
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    raw.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@settings(max_examples=300, deadline=None)
@given(text=st.text(min_size=1, max_size=40), prompt=st.text(max_size=5), fallback=st.booleans())
@example(text="héllo 🦊👩‍👩‍👧 ß€", prompt="", fallback=False)
@example(text="€€ 🦊a", prompt="🦊", fallback=True)
def test_pieces_add_up_and_are_never_half_a_character(
    tokenizer: Tokenizer, byte_fallback: Tokenizer, text: str, prompt: str, fallback: bool
) -> None:
    t = byte_fallback if fallback else tokenizer
    prompt_ids, ids = (
        t.encode(prompt, add_special_tokens=False),
        t.encode(text, add_special_tokens=False),
    )
    decoding = detokenizer(t, prompt_ids)
    pieces = [decoding.push([i]) for i in ids]
    assert decoding.flush() == "" or "\ufffd" in text
    whole, before = t.decode(prompt_ids + ids), t.decode(prompt_ids)
    assert before + "".join(pieces) == whole
    if "\ufffd" not in text:
        assert not any("\ufffd" in p for p in pieces)


@given(st.lists(st.integers(5, 260), min_size=1, max_size=80))
def test_any_tokens_at_all_decode_to_the_same_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    decoding = detokenizer(tokenizer, [])
    text = "".join(decoding.push([i]) for i in ids) + decoding.flush()
    assert text == tokenizer.decode(ids)


@given(
    ids=st.lists(st.integers(5, 260), max_size=80),
    cuts=st.lists(st.integers(0, 80), max_size=8),
    fallback=st.booleans(),
)
def test_many_tokens_at_once_say_what_single_ones_say(
    tokenizer: Tokenizer, byte_fallback: Tokenizer, ids: list[int], cuts: list[int], fallback: bool
) -> None:
    t = byte_fallback if fallback else tokenizer
    pieces, whole = detokenizer(t, []), detokenizer(t, [])
    expected = "".join(pieces.push([i]) for i in ids) + pieces.flush()
    text, bounds = "", sorted({0, len(ids), *(c for c in cuts if c < len(ids))})
    for start, end in pairwise(bounds):
        text += whole.push(ids[start:end])
    assert text + whole.flush() == expected


@given(cuts=st.lists(st.integers(1, 12), max_size=6))
@example(cuts=[])
def test_a_text_that_is_made_at_its_end_is_the_streamed_one(
    tokenizer: Tokenizer, folder: Path, cuts: list[int]
) -> None:
    maker = RequestMaker(model_facts(folder), 256, tokenizer)
    request = maker.make("hi", SamplingParams(max_tokens=50, stop_token_ids=(7,)))
    ids = [*tokenizer.encode("größer als 🦊", add_special_tokens=False), 7]
    parts = [
        ids[a:b] for a, b in pairwise([0, *sorted({c for c in cuts if c < len(ids)}), len(ids)])
    ]

    def news() -> list[SequenceOutput]:
        outputs = [SequenceOutput(request.request_id, 0, list(part)) for part in parts]
        outputs[-1].finish_reason, outputs[-1].stop_token_id = "stop", 7
        return outputs

    streamed, gathered = (
        RequestState(request, tokenizer),
        RequestState(request, tokenizer, stream=False),
    )
    whole = Delta(0)
    for output in news():
        delta, _ = streamed.push(output)
        assert delta is not None
        whole.extend(delta)
    *before, last = [gathered.push(output) for output in news()]
    assert before == [(None, False)] * (len(parts) - 1)
    assert last == (whole, False)
    assert whole.text == "größer als 🦊"
    assert streamed.finished
    assert gathered.finished


def earliest_completion(text: str, stops: list[str]) -> int:
    """The plain way: the first prefix of the text that ends with a stop string. Returns where that
    begins."""
    for end in range(len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return end - len(stop)
    return len(text)


@settings(max_examples=500)
@given(
    pieces=st.lists(st.text("ab", max_size=3), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_across_pieces(pieces: list[str], stops: list[str]) -> None:
    finder, out, found = StopStrings(tuple(stops)), "", None
    for piece in pieces:
        text, found = finder.push(piece)
        out += text
        if found:
            break
    out += finder.flush()
    whole = "".join(pieces)
    expected = whole[: earliest_completion(whole, stops)]
    if found is None:
        assert out == whole == expected
    else:
        # Within one piece the earliest completion wins; nothing past it was given out before.
        assert out == expected
        assert whole.startswith(out + found)


def test_held_text_comes_out_at_the_end() -> None:
    finder = StopStrings(("stop!",))
    assert finder.push("we sto") == ("we ", None)
    assert finder.push("p") == ("", None)
    assert finder.push("ped") == ("stopped", None)
    assert finder.push(" st") == (" ", None)
    assert finder.flush() == "st"


def outputs_of(tokenizer: Tokenizer, folder: Path, text: str, **params: Any) -> tuple[str, Any]:
    maker = RequestMaker(model_facts(folder), 256, tokenizer)
    state = RequestState(maker.make("hi", SamplingParams(max_tokens=None, **params)), tokenizer)
    out, last = "", None
    for token in tokenizer.encode(text):
        delta, _ = state.push(SequenceOutput("", 0, [token]))
        if delta is None:
            break
        out, last = out + delta.text, delta
    return out, last


def test_stop_strings_cut_the_text_and_give_the_reason(tokenizer: Tokenizer, folder: Path) -> None:
    text, last = outputs_of(tokenizer, folder, "one two three", stop=("two", "three"))
    assert (text, last.finish_reason, last.stop_reason) == ("one ", "stop", "two")
    text, _ = outputs_of(
        tokenizer, folder, "one two three", stop=("two",), include_stop_str_in_output=True
    )
    assert text == "one two"
    text, last = outputs_of(tokenizer, folder, "one two one two", stop=("two",), min_tokens=7)
    assert (text, last.stop_reason) == ("one two one ", "two")


def test_chat_template_is_sandboxed(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages) == "<user>hi<end><assistant>"
    for attack in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "{% for i in range(999999999) %}x{% endfor %}",
        "{{ 'x' * 99999999 }}",
        "{% if %}",
    ):
        with pytest.raises(InvalidRequest):
            tokenizer.apply_chat_template(messages, template=attack)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", math.nan),
        ("temperature", -1),
        ("temperature", math.inf),
        ("max_tokens", -1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -2),
        ("min_p", 1.5),
        ("n", 0),
        ("n", 10**9),
        ("min_tokens", -1),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", math.nan),
        ("seed", 2**63),
        ("logprobs", 10**6),
        ("stop", ("x",) * 10_000),
        ("stop", ("",)),
        ("stop", ("x" * 10_000,)),
        ("max_tokens", 1.5),
        ("max_tokens", "5"),
        ("n", True),
        ("temperature", "hot"),
        ("stop", (1,)),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", dict.fromkeys(range(5000), 0.0)),
    ],
)
def test_bad_parameters_name_their_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=field if field != "stop" else "stop") as e:
        SamplingParams(**{field: value})
    assert e.value.param == field


def test_a_single_stop_string_is_one_stop_string() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[3]) == SamplingParams(
        stop=("a", "b"), stop_token_ids=(3,)
    )


def test_bad_prompts(tokenizer: Tokenizer, folder: Path) -> None:
    maker = RequestMaker(model_facts(folder), 32, tokenizer)
    some = SamplingParams()
    for prompt, message in (
        ("", "empty"),
        ([], "empty"),
        ([5] * 33, "33 tokens and the context is 32"),
        ([5] * 32, "no tokens for the output"),
        ([999], "999 is not in the vocabulary"),
        ([-1], "-1 is not"),
        ("x" * 10**7, "characters"),
        ("\ud800", "surrogate"),
        ([True], "True is not"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            maker.make(prompt, some)
    with pytest.raises(InvalidRequest, match="logit_bias"):
        maker.make("x", SamplingParams(logit_bias={10**6: 1.0}))
    with pytest.raises(InvalidRequest, match="stop_token_ids"):
        maker.make("x", SamplingParams(stop_token_ids=(10**6,)))
    with pytest.raises(InvalidRequest, match="context"):
        maker.make("x", SamplingParams(max_tokens=33))
    assert maker.make([5] * 32, SamplingParams(max_tokens=0)).max_tokens == 0
    assert maker.make([5] * 30, SamplingParams(max_tokens=30)).max_tokens == 2


def test_without_a_tokenizer_only_token_ids_work(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer(tmp_path)
    maker = RequestMaker(model_facts(folder), 32, None)
    assert maker.make([5, 6], SamplingParams()).prompt_token_ids == [5, 6]
    with pytest.raises(InvalidRequest, match="token ids"):
        maker.make("text", SamplingParams())
