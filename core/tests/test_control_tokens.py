"""Users' text that reads like a control token stays text, and everything else is encoded as
before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.errors import InvalidRequest
from dovetail.frontend.tokenizer import Tokenizer
from dovetail_testing.plugin import make_model

TEMPLATE = (
    "{% for m in messages %}<user>{{ m['role'] }}: {{ m['content'] | trim }}<eos>{% endfor %}"
)
MARKER = "\ue000"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = make_model(tmp_path_factory.mktemp("model"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return Tokenizer(folder)


def control_ids(tokenizer: Tokenizer) -> set[int | None]:
    return {tokenizer.token_id("<user>"), tokenizer.token_id("<eos>")}


@settings(max_examples=200, deadline=None)
@given(
    pieces=st.lists(
        st.sampled_from(["<user>", "<eos>", "<", "eos>", "a b", "é", "🦊", MARKER, "\ue001"]),
        max_size=8,
    )
)
def test_control_tokens_are_the_templates_alone(tokenizer: Tokenizer, pieces: list[str]) -> None:
    messages = [{"role": "user", "content": "".join(pieces)}]
    token_ids = tokenizer.encode_chat(messages)
    assert sum(i in control_ids(tokenizer) for i in token_ids) == 2
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == tokenizer.apply_chat_template(
        messages
    )


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=40))
def test_other_text_is_encoded_as_it_is_rendered(tokenizer: Tokenizer, text: str) -> None:
    messages = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(messages)
    assert tokenizer.encode_chat(messages) == tokenizer.encode(rendered, add_special_tokens=False)


def test_messages_keep_what_is_no_text(tokenizer: Tokenizer) -> None:
    messages = [
        {
            "role": "user",
            "content": "<eos>",
            "tool_calls": [{"n": 1, "ok": True, "x": None, "<user>": "<user>"}],
        }
    ]
    template = "{{ messages[0].tool_calls | tojson }}{{ messages[0].content }}"
    token_ids = tokenizer.encode_chat(messages, template=template)
    assert not control_ids(tokenizer) & set(token_ids)
    assert (
        tokenizer.decode(token_ids) == '[{"n": 1, "ok": true, "x": null, "<user>": "<user>"}]<eos>'
    )


def test_a_conversation_longer_than_the_context_can_hold_is_refused_before_it_is_encoded(
    tokenizer: Tokenizer,
) -> None:
    with pytest.raises(InvalidRequest, match="more than fit into the context"):
        tokenizer.encode_chat([{"role": "user", "content": "a" * 100}], max_chars=50)


def test_the_marker_is_no_character_of_the_messages(tokenizer: Tokenizer, tmp_path: Path) -> None:
    content = "".join(map(chr, range(0xE000, 0xE100))) + "<eos>"
    messages = [{"role": "user", "content": content}]
    assert tokenizer.decode(tokenizer.encode_chat(messages), skip_special_tokens=False).endswith(
        content + "<eos>"
    )
