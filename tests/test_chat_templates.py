"""Chat templates render as transformers renders them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dovetail.frontend.tokenizer import Tokenizer
from dovetail_testing.plugin import make_model

MESSAGES = [
    {"role": "system", "content": 'Be <brief> & "exact" ü'},
    {"role": "user", "content": "Hi 🦊"},
    {"role": "assistant", "content": " Hello "},
]
TEMPLATES = {
    "generation tag": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{"
        " eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "a variable set within the tag": (
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    ),
    "tojson": "{{ messages | tojson }}",
    "tojson in ASCII": "{{ messages | tojson(ensure_ascii=True) }}",
    "tojson with separators": "{{ messages[0] | tojson(separators=(',', ':')) }}",
    "tojson indented": "{{ messages | tojson(indent=2) }}",
    "tojson sorted": "{{ messages[0] | tojson(sort_keys=True) }}",
    "tools that are none": (
        "{% if tools is not none %}tools{% else %}no tools{% endif %}{{ documents is none }}"
    ),
    "tools that are defined": (
        "{% if not tools is defined %}{% set tools = [] %}{% endif %}{{ tools }}"
    ),
    "special tokens": (
        "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ sep_token }}{{ cls_token }}"
    ),
    "loop controls": (
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }}{%"
        " endfor %}"
    ),
    "white space": "  {% for m in messages %}\n  {{ m.role }}\n  {% endfor %}\nend",
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor"
        " %}{{ ns.n }}"
    ),
    "generation prompt": "{% if add_generation_prompt %}<assistant>{% endif %}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_model(tmp_path_factory.mktemp("model"))
    config: dict[str, Any] = json.loads((made / "tokenizer_config.json").read_text())
    config |= {
        "bos_token": "<user>",
        "sep_token": "<end>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (made / "tokenizer_config.json").write_text(json.dumps(config))
    return made


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompted", [False, True])
def test_it_renders_as_transformers_does(folder: Path, name: str, prompted: bool) -> None:
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    theirs.chat_template = TEMPLATES[name]
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompted)
    ours = Tokenizer(folder)
    assert (
        ours.apply_chat_template(MESSAGES, template=TEMPLATES[name], add_generation_prompt=prompted)
        == expected
    )
