"""torch.compile changes no token (numerical sameness, float32): chunks, mixed batches, several
engines in a process."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

import pytest
from checkpoints import ARCHITECTURES, Checkpoint

from dovetail import LLM, SamplingParams

COMPILE = {"use": "torch", "execution": "compiled"}
BRIDGED = [name for name in ARCHITECTURES if "bridge" in name]


@pytest.mark.parametrize("name", BRIDGED)
def test_output_is_the_same_when_compiled(
    name: str, checkpoint: Callable[[str], Checkpoint], caplog: pytest.LogCaptureFixture
) -> None:
    made, rng = checkpoint(name), random.Random()
    prompts = [[rng.randrange(3, 203) for _ in range(length)] for length in (1, 33, 2, 16, 60, 7)]
    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    expected = [made.greedy(prompt, 16) for prompt in prompts]
    assert sum(map(len, expected)) > 16, (
        "nearly every step is too close to call: the test says nothing"
    )
    with (
        caplog.at_level(logging.WARNING),
        LLM(
            made.folder,
            dtype="float32",
            device="cpu",
            worker=COMPILE,
            scheduler={"max_num_batched_tokens": 40},
        ) as a,
        LLM(made.folder, dtype="float32", device="cpu", worker=COMPILE, overlap=True) as b,
    ):
        together = [a.generate(prompts, params), b.generate(prompts, params)]
        alone = [[llm.generate(prompt, params)[0] for prompt in prompts[:2]] for llm in (a, b)]
    for outputs in (*together, *alone):
        for output, tokens in zip(outputs, expected, strict=False):
            assert output.token_ids[: len(tokens)] == tokens, f"prompt {output.prompt_token_ids}"
    assert "compiled again" not in caplog.text
