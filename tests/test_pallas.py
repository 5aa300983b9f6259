"""The attention contract is not torch in disguise: torch's worker, JAX's attention and cache, the
same tokens."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from checkpoints import Checkpoint

from dovetail import LLM, SamplingParams
from dovetail.composition.resolution import resolve
from dovetail.plugin.config import EngineConfig


@pytest.mark.parametrize(
    "name", ["llama-3.1", "gpt-oss (bridge)"]
)  # full layers; full and sliding ones, with sinks
def test_greedy_tokens_are_those_of_the_reference(
    name: str, checkpoint: Callable[[str], Checkpoint]
) -> None:
    """Numerical sameness, over prefill in chunks beside decode."""
    rng = random.Random(seed := random.randrange(2**31))
    print("prompts from seed", seed)
    made = checkpoint(name)
    prompts = [[rng.randrange(3, 203) for _ in range(n)] for n in (1, 50, 17)]
    expected = [
        made.greedy(p, 12) for p in prompts
    ]  # transformers': up to where it is too close to call
    assert sum(map(len, expected)) > 8, (
        "nearly every step is too close to call: the test says nothing"
    )
    for attention in ("torch-reference", "pallas"):
        with LLM(
            made.folder,
            dtype="float32",
            device="cpu",
            attention=attention,
            scheduler={"max_num_batched_tokens": 30},
        ) as llm:
            assert {
                c.provider for key, c in llm.plan.choices.items() if key.startswith("attention")
            } == {attention}
            outputs = llm.generate(
                prompts, SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
            )
        for output, tokens in zip(outputs, expected, strict=True):
            assert output.token_ids[: len(tokens)] == tokens, (
                f"{attention}, prompt {output.prompt_token_ids}"
            )


def test_auto_leaves_it_alone(checkpoint: Callable[[str], Checkpoint]) -> None:
    choice = resolve(EngineConfig(model=str(checkpoint("llama-3.1").folder), device="cpu")).choices[
        "attention.full"
    ]
    assert "pallas" in {r.provider for r in choice.rejected}
