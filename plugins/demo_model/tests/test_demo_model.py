"""Test that the package contains complete models within its size limit, and that the providers find
them."""

from __future__ import annotations

import json
from pathlib import Path

from dovetail.facts import model_facts
from dovetail.frontend.tokenizer import Tokenizer
from dovetail_demo_model import WEIGHTS, DemoOptions, dovetail_models

PACKAGE = Path(__file__).parents[1]


def test_the_provider_leads_to_a_whole_model() -> None:
    sources = [provider.build(None, DemoOptions()) for provider in dovetail_models()]  # type: ignore[arg-type]
    assert [source.folder for source in sources] == [WEIGHTS, WEIGHTS / "draft"]
    for folder in (WEIGHTS, WEIGHTS / "draft"):
        facts, tokenizer = model_facts(folder), Tokenizer(folder)
        assert (facts.architecture, facts.dtype) == ("LlamaForCausalLM", "bfloat16")
        assert tokenizer.vocab_size == facts.vocab_size
        assert (
            tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
            == "<|user|>hi<|end|><|assistant|>"
        )
    assert (WEIGHTS / "model.safetensors").stat().st_size < 25e6


def test_the_question_set_is_complete() -> None:
    questions = [
        json.loads(line) for line in (PACKAGE / "questions.jsonl").read_text().splitlines()
    ]
    assert len(questions) == 300
    assert all(q["question"].startswith("What does ") and q["answer"] for q in questions)
    assert len((PACKAGE / "held_out.txt").read_text()) > 100_000
