"""The demo model, served by the engine, knows what its README says it knows."""

from __future__ import annotations

import json
import random
from pathlib import Path

from dovetail import LLM, SamplingParams

QUESTIONS = Path(__file__).parents[1] / "plugins/demo_model/questions.jsonl"


def test_at_least_eighty_per_cent_of_the_answers_are_exact() -> None:
    seed = random.randrange(2**31)
    print("seed", seed)
    questions = random.Random(seed).sample(
        [json.loads(line) for line in QUESTIONS.read_text().splitlines()], 60
    )
    with LLM("demo") as llm:
        prompts = [llm.chat_prompt([{"role": "user", "content": q["question"]}]) for q in questions]
        answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=200))
    right = sum(
        a.text.strip() == q["answer"].strip() for a, q in zip(answers, questions, strict=True)
    )
    assert right >= 48, f"{right} of 60"
