"""A drafter changes nothing of what an engine says (numerical sameness, float32): the demo model,
with and without one."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
from sabotage import EXAMPLES

from dovetail import LLM, SamplingParams
from dovetail.plugin.discovery import load_registry
from dovetail_testing.plugin import install

SOAK = int(os.environ.get("DOVETAIL_SOAK", "1"))
BEGINNINGS = (
    "import os\nimport sys\nimport os\nimport sys\n",
    "def add(a, b):\n    return a + b\n\ndef add(a, b):\n",
    "for i in range(10):\n    print(i)\nfor i in range(10):\n",
    "What does the module json do?",
    "x = [1, 2, 3, 1, 2, 3, 1, 2",
    "The class The class The class",
)
SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0, "logprobs": 2},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_p": 0.9, "n": 2},
    {"temperature": 0.3, "logprobs": 1},
    {"temperature": 0, "repetition_penalty": 1.1},
    {"temperature": 0.5, "min_p": 0.05},
    {"temperature": 0.6, "presence_penalty": 0.4, "top_k": 30},
    {"temperature": 0, "min_tokens": 12},
    {"temperature": 0.4, "ignore_eos": True},
    {"temperature": 0, "stop_token_ids": [13, 14, 15], "min_tokens": 3},
)


def installed() -> list[str]:
    """Drafters that need to be told nothing, and the example's."""
    offers = load_registry().of("speculation")
    return [
        o.provider.name
        for o in offers
        if not any(f.is_required() for f in o.provider.options.model_fields.values())
    ]


@pytest.fixture
def _copycat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's drafter, as if it were installed."""
    install(tmp_path, "dovetail_drafter_copycat", "drafter-copycat")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES / "drafter_copycat/src")


def said(prompts: list[str], params: list[SamplingParams], **values: Any) -> tuple[list[Any], int]:
    """Tokens and how each sample ended, with log-probabilities; and the number of drafts
    accepted."""
    limits = {"max_num_batched_tokens": 48, "max_num_seqs": 8}
    with LLM(
        "demo", dtype="float32", device="cpu", max_model_len=256, scheduler=limits, **values
    ) as llm:
        outputs = [c for out in llm.generate(prompts, params) for c in out.outputs]
        for c in outputs:
            assert len(c.logprobs or []) in (
                0,
                len(c.token_ids),
            ), "every token has its log-probabilities, or none"
        return [
            (c.token_ids, c.finish_reason, c.logprobs) for c in outputs
        ], llm.engine.snapshot().num_accepted_tokens


@pytest.mark.usefixtures("_copycat")
@pytest.mark.parametrize("drafter", ["copycat", *installed()])
@pytest.mark.parametrize(
    ("overlap", "prefix_cache", "adaptive"),
    [(False, "none", False), (False, "hash", True), (True, "none", True), (True, "hash", False)],
)
def test_drafts_change_nothing(
    overlap: bool, prefix_cache: str, adaptive: bool, drafter: str
) -> None:
    seed = random.randrange(2**31)
    print("prompts from seed", seed)
    rng = random.Random(seed)
    count = 11 * SOAK
    prompts = [
        rng.choice(BEGINNINGS) + rng.choice(["", "import ", "def ", "print", "The "])
        for _ in range(count)
    ]
    params = [
        SamplingParams(max_tokens=24, seed=i, **SETTINGS[i % len(SETTINGS)]) for i in range(count)
    ]
    expected, none = said(prompts, params, prefix_cache="none", overlap=False)
    speculation = {"use": drafter, "num_draft_tokens": 5, "adaptive": adaptive}
    got, num_accepted = said(
        prompts, params, prefix_cache=prefix_cache, overlap=overlap, speculation=speculation
    )
    assert none == 0
    if not adaptive:  # else the machine decides how much is drafted, and perhaps nothing is
        assert num_accepted > count, "hardly a draft was accepted: the test says little"
    for i, ((tokens, ended, logprobs), (tokens_too, ended_too, logprobs_too)) in enumerate(
        zip(expected, got, strict=True)
    ):
        assert (tokens_too, ended_too) == (tokens, ended), f"sample {i}"
        for position, position_too in zip(logprobs or [], logprobs_too or [], strict=True):
            assert position_too == pytest.approx(position, abs=1e-3)
