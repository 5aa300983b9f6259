"""Greedy output equals transformers', token for token, however the work was cut up (numerical
sameness, float32)."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
from checkpoints import ARCHITECTURES, Checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dovetail import LLM, SamplingParams

SOAK = int(os.environ.get("DOVETAIL_SOAK", "1"))
BACKENDS = ("torch-reference", "attention-cpu")


def ragged_prompts(count: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [
        [rng.randrange(3, 203) for _ in range(rng.choice([1, 2, 7, 16, 33, 60]))]
        for _ in range(count)
    ]


def assert_same(
    llm: LLM, expected: list[list[int]], prompts: list[list[int]], num_tokens: int
) -> None:
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    outputs = llm.generate(prompts, params)
    for output, tokens in zip(outputs, expected, strict=True):
        assert output.token_ids[: len(tokens)] == tokens, f"prompt {output.prompt_token_ids}"
    assert llm.engine.kv.num_used == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_equals_transformers(
    name: str, backend: str, checkpoint: Callable[[str], Checkpoint]
) -> None:
    seed = random.randrange(2**31)
    print("prompts from seed", seed)
    made, prompts = checkpoint(name), ragged_prompts(6, seed)
    expected = [made.greedy(p, 24) for p in prompts]
    assert sum(map(len, expected)) > 24, (
        "nearly every step is too close to call: the test says nothing"
    )
    with LLM(
        made.folder,
        dtype="float32",
        attention=backend,
        device="cpu",
        scheduler={"max_num_batched_tokens": 40},
    ) as llm:
        assert (
            llm.plan.choices[
                "attention.full" if "full" in llm.plan.layer_kinds else "attention.sliding"
            ].provider
            == backend
        )
        assert_same(llm, expected, prompts, 24)


@settings(max_examples=60 * SOAK, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(["llama-3.1", "mistral", "qwen2"]),
    setting=st.sampled_from(
        [
            ("torch-reference", 1),
            ("torch-reference", 8),
            ("attention-cpu", 16),
            ("attention-cpu", 32),
        ]
    ),
    seed=st.integers(0, 2**31),
    count=st.integers(1, 8),
    budget=st.integers(1, 80),
    max_num_seqs=st.integers(1, 8),
    overlap=st.booleans(),
    tight=st.booleans(),
)
def test_output_is_the_same_for_every_mix(
    checkpoint: Callable[[str], Checkpoint],
    name: str,
    setting: tuple[str, int],
    seed: int,
    count: int,
    budget: int,
    max_num_seqs: int,
    overlap: bool,
    tight: bool,
) -> None:
    """Chunk size, batch mix, block size, preemption, plain or overlapped loop, attention
    backend."""
    (backend, block_size), made, prompts = setting, checkpoint(name), ragged_prompts(count, seed)
    values: dict[str, Any] = {"kv_cache": {"block_size": block_size}}
    if tight:  # just enough for one sequence, so that several preempt each other
        config = made.model.config
        head_size = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        values["kv_cache"]["memory_gb"] = (
            1.6 * 96 * 2 * 2 * config.num_key_value_heads * head_size * 4 / 2**30
        )
        values["max_model_len"] = 96
    with LLM(
        made.folder,
        dtype="float32",
        device="cpu",
        attention=backend,
        overlap=overlap,
        scheduler={"max_num_batched_tokens": budget, "max_num_seqs": max_num_seqs},
        **values,
    ) as llm:
        assert_same(llm, [made.greedy(p, 16) for p in prompts], prompts, 16)


def test_a_seeded_request_is_the_same_alone_and_in_any_batch(
    checkpoint: Callable[[str], Checkpoint],
) -> None:
    made, prompts = checkpoint("llama-3.1"), ragged_prompts(9, 7)
    each = [
        SamplingParams(
            max_tokens=20,
            temperature=0.5 + i / 10,
            top_k=[0, 20][i % 2],
            top_p=[1.0, 0.9][i % 3 == 0],
            min_p=[0.0, 0.02][i % 4 == 0],
            repetition_penalty=[1.0, 1.2][i % 2],
            presence_penalty=0.1 * i,
            seed=i,
            n=1 + i % 3,
            ignore_eos=True,
            logprobs=2,
        )
        for i in range(len(prompts))
    ]
    with LLM(made.folder, dtype="float32", device="cpu") as llm:
        alone = [llm.generate(p, s)[0] for p, s in zip(prompts, each, strict=True)]
    with LLM(
        made.folder,
        dtype="float32",
        device="cpu",
        scheduler={"max_num_batched_tokens": 7},
        overlap=True,
    ) as llm:
        together = llm.generate(prompts, each)
    for a, b in zip(alone, together, strict=True):
        assert [c.token_ids for c in a.outputs] == [c.token_ids for c in b.outputs]
    samples = [c.token_ids for c in alone[2].outputs]
    assert len({tuple(s) for s in samples}) == len(samples), "samples of one request are the same"


def test_two_engines_live_in_one_process(checkpoint: Callable[[str], Checkpoint]) -> None:
    one, two = checkpoint("qwen3"), checkpoint("gpt2 (bridge)")
    prompts = ragged_prompts(3, 11)
    with (
        LLM(one.folder, dtype="float32", device="cpu") as a,
        LLM(two.folder, dtype="float32", device="cpu", overlap=True) as b,
    ):
        params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
        streams = [
            (a.stream(prompts[0], params), one.greedy(prompts[0], 12)),
            (b.stream(prompts[1], params), two.greedy(prompts[1], 12)),
        ]
        got: list[list[int]] = [[], []]
        for pair in zip(*(s for s, _ in streams), strict=True):  # step by step, in turn
            for tokens, delta in zip(got, pair, strict=True):
                tokens += delta.token_ids
        for tokens, (_, expected) in zip(got, streams, strict=True):
            assert tokens[: len(expected)] == expected


def test_logprobs_are_those_of_the_model(checkpoint: Callable[[str], Checkpoint]) -> None:
    import torch

    made, prompt = checkpoint("llama-2"), ragged_prompts(1, 3)[0] + [5, 6, 7]
    params = SamplingParams(
        max_tokens=8, temperature=0.7, seed=1, logprobs=3, prompt_logprobs=2, ignore_eos=True
    )
    with LLM(
        made.folder, dtype="float32", device="cpu", scheduler={"max_num_batched_tokens": 5}
    ) as llm:
        out, scored = llm.generate(
            [prompt] * 2, [params, SamplingParams(max_tokens=0, prompt_logprobs=0)]
        )
    with torch.inference_mode():
        reference = (
            made.model(torch.tensor([prompt + out.token_ids])).logits[0].float().log_softmax(-1)
        )
    assert len(out.logprobs) == 8
    for i, position in enumerate(out.logprobs):
        row = reference[len(prompt) + i - 1]
        assert next(iter(position)) == out.token_ids[i]
        assert set(row.topk(3).indices.tolist()) <= set(position)
        for token, value in position.items():
            assert value == pytest.approx(row[token].item(), abs=1e-3)
    assert out.prompt_logprobs[0] is None
    assert len(out.prompt_logprobs) == len(prompt) == len(scored.prompt_logprobs)
    for i in range(1, len(prompt)):
        assert out.prompt_logprobs[i][prompt[i]] == pytest.approx(
            reference[i - 1, prompt[i]].item(), abs=1e-3
        )
        assert scored.prompt_logprobs[i] == pytest.approx(
            {prompt[i]: out.prompt_logprobs[i][prompt[i]]}, abs=1e-5
        )
    assert (scored.token_ids, scored.finish_reason) == ([], "length")
